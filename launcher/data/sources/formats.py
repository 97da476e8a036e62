"""From a row's keys and values to a document: the formats, how they are told apart, and what is refused. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from typing import Any, NoReturn

from launcher.config.data import COLUMNS_EXAMPLE
from launcher.data.checks import patterns
from launcher.data.sources.documents import ROLES, Chat, Completion, Document, Message, PlainText
from launcher.errors import DataError, Problem

Row = dict[str, Any]
Parser = Callable[[Row, str], Document]

# What the keys of a row must hold for a format to fit.
_KEYS = {
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
    "text": {"text"},
}
# Other names for ROLES: OpenAI's, and ShareGPT's.
_OTHER_ROLES = {"developer": "system", "function": "tool"}
_SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "model": "assistant", "bing": "assistant", "chatgpt": "assistant"},
    **{"function_call": "function_call", "tool_call": "function_call"},
    **{"observation": "tool", "tool": "tool", "function_response": "tool", "tool_response": "tool"},
}
# Keys by which a message says whether it is trained: 1 and true train the message, 0 and false leave it out.
# weight: OpenAI and Mistral. loss_weight: LLaMA-Factory (v1). train, training: what axolotl's message_field_training names.
# loss: ms-swift, and the ShareGPT rows of AgentInstruct. loss_mask: verl.
_TRAINED_KEYS = ("weight", "loss_weight", "train", "training", "loss", "loss_mask")
# torchtune's Message: true leaves the message out.
_MASKED_KEY = "masked"
# Weights of parts of a message (axolotl), and keys whose meaning differs from tool to tool.
_UNREAD_WEIGHT_KEYS = ("train_detail", "training_detail", "trainable", "mask")
WEIGHT_KEYS = frozenset((*_TRAINED_KEYS, _MASKED_KEY, *_UNREAD_WEIGHT_KEYS))
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_SHOWN_CHARS = 40
_REMEDY_KEY = f"add the key, set the source's format, or name the row's own key in the source's columns: {COLUMNS_EXAMPLE}"


def renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    """`row` with the keys that the formats know, where `columns` gives the row's own names for them."""
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            refuse(
                f"the row lacks the key {theirs}, which columns.{ours} names ({_found(row)})",
                where,
                f"name a key that the rows have in the source's columns: {COLUMNS_EXAMPLE}",
            )
    # What a mapped name hid is not meant.
    rest = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
    return {**rest, **{ours: row[theirs] for ours, theirs in columns.items()}}


def recognised(row: Row, where: str) -> str:
    """The format that the row's keys fit; errors: DataError with the keys where none or several do."""
    fitting = [name for name, keys in _KEYS.items() if keys <= row.keys()]
    if len(fitting) == 1:
        return _by_items(row, fitting[0])
    if fitting:
        what = f"the row fits the formats {' and '.join(fitting)} ({_found(row)})"
        refuse(what, where, "set the source's format to one of them")
    remedy = (
        "give rows the key messages, conversations or text, instruction and output, or prompt and completion; "
        f"or name the rows' own keys in the source's columns: {COLUMNS_EXAMPLE}"
    )
    refuse(f"the row has the keys of no known format ({_found(row)})", where, remedy)


def _by_items(row: Row, format: str) -> str:
    """Files hold both kinds of messages under either key."""
    key = {"messages": "messages", "sharegpt": "conversations"}.get(format)
    items = from_json(row[key]) if key else None
    first = items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}
    if {"from", "value"} <= first.keys():
        return "sharegpt"
    return "messages" if {"role", "content"} <= first.keys() else format


def chat_key(keys: Container[str], format: str) -> str:
    """The key of a row whose messages the format messages or sharegpt reads."""
    own, other = ("messages", "conversations") if format == "messages" else ("conversations", "messages")
    return other if other in keys and own not in keys else own


def _messages(row: Row, where: str) -> Chat:
    key = chat_key(row, "messages")
    items = _items(row, key, where)
    messages = tuple(_message(item, f"{key}[{i}]", where) for i, item in enumerate(items))
    tools = row.get("tools") if row.get("tools") is not None else row.get("functions")
    return Chat(where, _with_system(row, messages, where), _tools(tools, where))


def _message(item: Row, at: str, where: str) -> Message:
    given = _value(item, "role", str, where, f"{at}.")
    role = _OTHER_ROLES.get(given, given)
    if role not in ROLES:
        refuse(f"{at}.role is unknown: {shown(given)!r}", where, f"write one of {', '.join((*ROLES, *_OTHER_ROLES))}")
    calls = [item["function_call"]] if item.get("function_call") else item.get("tool_calls") or []
    if calls and role != "assistant":
        refuse(f"{at} calls a tool, and is not the assistant's", where, "write tool_calls into assistant messages only")
    reasoning = next((k for k in REASONING_KEYS if item.get(k) is not None), None)
    return Message(
        role,
        _content(item, at, where, may_be_null=bool(calls)),
        tool_calls=tuple(_tool_call(call, f"{at}.tool_calls[{i}]", where) for i, call in enumerate(_listed(calls, at, where))),
        name=_optional(item, "name", where, f"{at}."),
        tool_call_id=_optional(item, "tool_call_id", where, f"{at}."),
        weight=_weight(item, given, role == "assistant", at, where),
        reasoning_content=None if reasoning is None else _value(item, reasoning, str, where, f"{at}."),
    )


def _weight(item: Row, sender: str, is_assistant: bool, at: str, where: str) -> int | None:
    """Whether an assistant's message is trained, by any of WEIGHT_KEYS; None where the message does not say.

    Errors: DataError for a weight between 0 and 1, keys that contradict each other, and other messages that are to be trained.
    """
    if item.keys().isdisjoint(WEIGHT_KEYS):
        return None
    if unread := next((key for key in _UNREAD_WEIGHT_KEYS if item.get(key) not in (None, [])), None):
        remedy = f"write weight in place of {unread}: 1 to train the whole message, 0 to leave it out"
        refuse(f"{at} says by {unread} whether it is trained, which is not read here", where, remedy)
    weights = {key: _zero_or_one(item[key], f"{at}.{key}", where) for key in _TRAINED_KEYS if item.get(key) is not None}
    if item.get(_MASKED_KEY) is not None:
        weights[_MASKED_KEY] = 1 - _zero_or_one(item[_MASKED_KEY], f"{at}.{_MASKED_KEY}", where)
    if not weights:
        return None
    if len(set(weights.values())) > 1:
        keys = " and ".join(f"{key}: {_number(item[key])}" for key in weights)
        refuse(f"{at} says that it is trained and that it is not ({keys})", where, "leave one of the keys")
    key, weight = next(iter(weights.items()))
    if weight and not is_assistant:
        what = f"{at}.{key} is {_number(item[key])} in a message of the role {shown(sender)}"
        refuse(what, where, "only assistant messages are trained; take it out")
    return weight if is_assistant else None


def _zero_or_one(value: Any, at: str, where: str) -> int:
    if not isinstance(value, int | float) or value not in (0, 1):
        given = _number(value) if isinstance(value, int | float) else f"a {json_name(value)}"
        remedy = "write 1 to train the message, 0 to leave it out"
        refuse(f"{at} is {given}, not 0 or 1", where, remedy)
    return int(value)


def _number(value: float | bool) -> str:
    """A number or boolean as JSON writes it."""
    return shown(json.dumps(value))


def _content(item: Row, at: str, where: str, may_be_null: bool) -> str:
    """A message's text, which may come in parts; it may be absent where the assistant calls a tool."""
    content = item.get("content")
    if content is None and may_be_null:
        return ""
    if not isinstance(content, list):
        return str(_value(item, "content", str, where, f"{at}."))
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else json_name(part)
        if not isinstance(part, dict) or kind != "text":
            what = f"{at}.content[{i}] is of the type {shown(kind)}, not text"
            refuse(what, where, "leave the row out: only text is trained here")
        texts.append(_value(part, "text", str, where, f"{at}.content[{i}]."))
    return "".join(texts)


def _tool_call(call: Any, at: str, where: str) -> Row:
    if not isinstance(call, dict):
        refuse(f"{at} is a {json_name(call)}, not an object", where, "write {name, arguments}")
    inner = call.get("function")
    function: Row = inner if isinstance(inner, dict) else call
    name = _value(function, "name", str, where, f"{at}.")
    arguments = from_json(function.get("arguments") if "arguments" in function else function.get("parameters", {}))
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        refuse(f"{at}: the arguments of {shown(name)} are no JSON object", where, "write an object, or its JSON text")
    made: Row = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _tools(tools: Any, where: str) -> tuple[Row, ...]:
    """Tool definitions in OpenAI's form; a list, its JSON text, or the bare functions."""
    made = []
    for i, tool in enumerate(_listed(tools, "tools", where) if tools not in (None, "") else []):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            refuse(f"tools[{i}] describes no function", where, "write {name, description, parameters}")
        made.append(tool if "function" in tool else {"type": "function", "function": function})
    return tuple(made)


def _listed(value: Any, at: str, where: str) -> list[Any]:
    value = from_json(value)
    if not isinstance(value, list):
        refuse(f"{at} is a {json_name(value)}, not a list", where, f"write {at} as a list")
    return value


def _with_system(row: Row, messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The row's own key `system` comes first, where it is not empty."""
    text = _optional(row, "system", where)
    if not text:
        return messages
    if messages[0].role == "system":
        refuse("the row has the key system and a system message", where, "leave one of them out")
    return (Message("system", text), *messages)


def _sharegpt(row: Row, where: str) -> Chat:
    key = chat_key(row, "sharegpt")
    messages = []
    for i, item in enumerate(_items(row, key, where)):
        at = f"{key}[{i}]"
        sender, value = _value(item, "from", str, where, f"{at}."), _value(item, "value", str, where, f"{at}.")
        role = _SHAREGPT_ROLES.get(sender.lower())
        if role is None:
            refuse(f"{at}.from is unknown: {shown(sender)!r}", where, f"write one of {', '.join(_SHAREGPT_ROLES)}")
        weight = _weight(item, sender, role in ("assistant", "function_call"), at, where)
        if role == "function_call":
            calls = from_json(value)
            calls = calls if isinstance(calls, list) else [calls]
            made = tuple(_tool_call(call, f"{at}.value", where) for call in calls)
            messages.append(Message("assistant", "", tool_calls=made, weight=weight))
        else:
            messages.append(Message(role, value, weight=weight))
    return Chat(where, _with_system(row, tuple(messages), where), _tools(row.get("tools"), where))


def _alpaca(row: Row, where: str) -> Chat:
    """The input follows the instruction after an empty line; `history` holds earlier pairs of question and answer."""
    earlier: list[Message] = []
    for i, pair in enumerate(_listed(row.get("history") or [], "history", where)):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            refuse(f"history[{i}] is no pair of texts", where, "write [question, answer]")
        earlier += [Message("user", pair[0]), Message("assistant", pair[1])]
    instruction, extra = _value(row, "instruction", str, where), _optional(row, "input", where)
    question = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    messages = (*earlier, Message("user", question), Message("assistant", _value(row, "output", str, where)))
    return Chat(where, _with_system(row, messages, where), _tools(row.get("tools"), where))


def _completion(row: Row, where: str) -> Completion:
    return Completion(where, _value(row, "prompt", str, where), _value(row, "completion", str, where))


def _plain_text(row: Row, where: str) -> PlainText:
    return PlainText(where, _value(row, "text", str, where))


PARSERS: dict[str, Parser] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _completion,
    "text": _plain_text,
}


def _items(row: Row, key: str, where: str) -> list[Row]:
    row = {**row, key: from_json(row[key])} if key in row else row
    items = _value(row, key, list, where)
    if not items:
        refuse(f"{key} is empty", where, "remove the row, or write at least one message")
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            refuse(f"{key}[{i}] is a {json_name(item)}, not an object", where, "write messages as {role, content}")
    return list(items)


def from_json(value: Any) -> Any:
    """Tables keep lists and objects as JSON text; any other text is returned as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _optional(row: Row, key: str, where: str, inside: str = "") -> str | None:
    return None if row.get(key) is None else str(_value(row, key, str, where, inside))


def _value(row: Row, key: str, kind: type, where: str, inside: str = "") -> Any:
    if key not in row:
        refuse(f"the row lacks the key {inside}{key} ({_found(row)})", where, _REMEDY_KEY)
    value = row[key]
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "text"
        refuse(f"{inside}{key} is a {json_name(value)}, not {wanted}", where, f"write {inside}{key} as {wanted}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            refuse(f"{inside}{key} holds half of a surrogate pair", where, "write the character whole, in UTF-8")
    return value


def _found(row: Row) -> str:
    return f"found: {', '.join(sorted(map(shown, row))) or 'none'}"


def shown(value: object) -> str:
    """What an error may say of a value out of the data: its beginning, without keys, passwords and addresses."""
    text = str(value)
    # Of half a key nothing tells any more that it is one.
    safe = " ".join(patterns.redacted([text])[0].split())
    return safe if len(safe) <= _SHOWN_CHARS else f"{safe[:_SHOWN_CHARS]}… ({len(text):,} characters)"


def json_name(value: object) -> str:
    """What JSON calls the type of `value`."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def refuse(what: str, where: str, remedy: str, value: str = "") -> NoReturn:
    raise DataError(Problem(what, where=where, value=value, remedy=remedy))
