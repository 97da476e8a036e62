"""The row formats: how a row becomes a document, which keys identify a format, and which keys no format reads. Pure.

To add a format, write a function (row, place) -> Document and give it an entry in `FORMATS`. To let users select it by name, add
the name to `Source.format` in launcher/config/sections/data.py. Keys that no format reads are counted for the report, or refused
if they mark a row for another kind of training; their names are those of TRL, LLaMA-Factory, ms-swift and axolotl.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from launcher.config.sections.data import COLUMNS_EXAMPLE, RowSource
from launcher.data.sources.documents import (
    ROLES,
    Document,
    Message,
    Row,
    a_json_type,
    find_value,
    from_json,
    json_type,
    list_keys,
    read_optional,
    read_value,
    refuse,
    require_list,
    safe_excerpt,
)

# ShareGPT's names for ROLES, and for an assistant message that calls a tool.
_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bing", "chatgpt"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
}
# Keys for the subject of a question, which the format question_answer does not read.
_CONTEXT_KEYS = ("context", "passage", "paragraph", "document", "article", "story", "evidence", "choices", "options")

# OpenAI's other names for ROLES.
_OTHER_ROLES = {"developer": "system", "function": "tool"}
# Keys that say whether a message is trained: 1 and true train it, 0 and false mask it.
# weight: OpenAI and Mistral. loss_weight: LLaMA-Factory (v1). train, training: names for axolotl's message_field_training.
# loss: ms-swift, and the ShareGPT rows of AgentInstruct. loss_mask: verl.
_TRAINED_KEYS = ("weight", "loss_weight", "train", "training", "loss", "loss_mask")
# torchtune's Message: true masks the message.
_MASKED_KEY = "masked"
# Weights for parts of a message (axolotl), and keys whose meaning differs between tools.
_UNREAD_WEIGHT_KEYS = ("train_detail", "training_detail", "trainable", "mask")
WEIGHT_KEYS = frozenset((*_TRAINED_KEYS, _MASKED_KEY, *_UNREAD_WEIGHT_KEYS))
# Types of the text parts of a message's content, and the keys that hold the text.
_TEXT_PARTS = ("text", "input_text", "output_text")
_PART_TEXT_KEYS = ("text", "value", "content")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Optional keys of a message in the format messages.
MESSAGE_KEYS = frozenset({"name", "tool_calls", "function_call", "tool_call_id", *_REASONING_KEYS}) | WEIGHT_KEYS

NUM_KEYS_SHOWN = 20

# Keys for whether the answer is good: TRL and ms-swift; LLaMA-Factory.
_VERDICT_KEYS = ("label", "kto_tag")
_MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")


@dataclass(frozen=True)
class RowFormat:
    """How rows of one format are recognized and parsed.

    `parse(row, place)` returns the document, or raises DataError with the place. A row with all `required_keys` has this format;
    `parse` also reads `optional_keys`. For a format of messages, `chat_keys` are the keys that may hold the list of messages, its
    own first. A message has `required_message_keys`; `parse` also reads `optional_message_keys`. `turn_keys` hold either text or
    a list of messages.
    """

    parse: Callable[[Row, str], Document]
    required_keys: Set[str]
    optional_keys: Set[str] = frozenset()
    chat_keys: tuple[str, ...] = ()
    turn_keys: tuple[str, ...] = ()
    required_message_keys: Set[str] = frozenset()
    optional_message_keys: Set[str] = frozenset()

    @functools.cached_property
    def keys(self) -> Set[str]:
        return self.required_keys | self.optional_keys

    @functools.cached_property
    def message_keys(self) -> Set[str]:
        return self.required_message_keys | self.optional_message_keys


def parse_messages(row: Row, where: str) -> Document:
    """Parse a list of {role, content}, as in OpenAI's fine-tuning files."""
    key = next((key for key in FORMATS["messages"].chat_keys if key in row), "messages")
    messages = tuple(parse_message(item, f"{key}[{i}]", where) for i, item in enumerate(read_messages(row, key, where)))
    tools = row.get("tools") if row.get("tools") is not None else row.get("functions")
    return Document(where, _add_system(row, messages, where), parse_tools(tools, where))


def parse_sharegpt(row: Row, where: str) -> Document:
    """Parse a list of {from, value}."""
    key = next((key for key in FORMATS["sharegpt"].chat_keys if key in row), "conversations")
    messages = []
    for i, item in enumerate(read_messages(row, key, where)):
        key_path = f"{key}[{i}]"
        sender, value = (read_value(item, name, str, where, f"{key_path}.") for name in ("from", "value"))
        role = _SHAREGPT_ROLES.get(sender.lower())
        if role is None:
            refuse(f"{key_path}.from is unknown: {safe_excerpt(sender)!r}", where, f"write one of {', '.join(_SHAREGPT_ROLES)}")
        weight = parse_weight(item, sender, role in ("assistant", "function_call"), key_path, where)
        if role == "function_call":
            calls = from_json(value)
            calls = calls if isinstance(calls, list) else [calls]
            tool_calls = tuple(parse_tool_call(call, f"{key_path}.value", where) for call in calls)
            messages.append(Message("assistant", "", tool_calls=tool_calls, weight=weight))
        else:
            messages.append(Message(role, value, weight=weight))
    return Document(where, _add_system(row, tuple(messages), where), parse_tools(row.get("tools"), where))


def parse_alpaca(row: Row, where: str) -> Document:
    """Parse instruction, input (after an empty line) and output; `history` has earlier pairs of question and answer."""
    earlier: list[Message] = []
    for i, pair in enumerate(require_list(row.get("history") or [], "history", where)):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            refuse(f"history[{i}] is not a pair of texts", where, "write [question, answer]")
        earlier += [Message("user", pair[0]), Message("assistant", pair[1])]
    instruction, extra = read_value(row, "instruction", str, where), read_optional(row, "input", where)
    question = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    messages = (*earlier, Message("user", question), Message("assistant", read_value(row, "output", str, where)))
    return Document(where, _add_system(row, messages, where), parse_tools(row.get("tools"), where))


def parse_completion(row: Row, where: str) -> Document:
    """Parse a prompt and its completion: two texts, or two lists of messages, of which the completion is trained (TRL)."""
    tools = parse_tools(row.get("tools"), where)
    if not tools and not any(isinstance(row.get(key), list) for key in ("prompt", "completion")):
        return Document(where, prompt=read_value(row, "prompt", str, where), text=read_value(row, "completion", str, where))
    earlier, answer = _parse_turns(row, "prompt", "user", where), _parse_turns(row, "completion", "assistant", where)
    if not any(message.role == "assistant" for message in answer):
        refuse("completion has no message with the role assistant", where, "write the answer as an assistant's message")
    earlier = [replace(message, weight=0) if message.role == "assistant" else message for message in earlier]
    return Document(where, (*earlier, *answer), tools)


def _parse_turns(row: Row, key: str, role: str, where: str) -> list[Message]:
    """Return the messages under `key`: a list of messages, or the text of one message of `role`; an empty text gives none."""
    if isinstance(row.get(key), list):
        return [parse_message(item, f"{key}[{i}]", where) for i, item in enumerate(read_messages(row, key, where))]
    text = read_value(row, key, str, where)
    return [Message(role, text)] if text else []


def parse_question_answer(row: Row, where: str) -> Document:
    """Parse a question and its answer."""
    return Document(where, prompt=read_value(row, "question", str, where), text=read_value(row, "answer", str, where))


def parse_text(row: Row, where: str) -> Document:
    """Parse plain text."""
    return Document(where, text=read_value(row, "text", str, where))


def _add_system(row: Row, messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """Put the row's key `system` in front of the messages, if it is not empty."""
    text = read_optional(row, "system", where)
    if not text:
        return messages
    if messages[0].role == "system":
        refuse("the row has the key system and a system message", where, "remove one of them")
    return (Message("system", text), *messages)


FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat(
        parse_messages,
        required_keys={"messages"},
        optional_keys={"conversations", "system", "tools", "functions"},
        chat_keys=("messages", "conversations"),
        required_message_keys={"role", "content"},
        optional_message_keys=MESSAGE_KEYS,
    ),
    "sharegpt": RowFormat(
        parse_sharegpt,
        required_keys={"conversations"},
        optional_keys={"messages", "system", "tools"},
        chat_keys=("conversations", "messages"),
        required_message_keys={"from", "value"},
        optional_message_keys=WEIGHT_KEYS,
    ),
    "alpaca": RowFormat(
        parse_alpaca,
        required_keys={"instruction", "output"},
        optional_keys={"input", "history", "system", "tools"},
    ),
    "prompt_completion": RowFormat(
        parse_completion,
        required_keys={"prompt", "completion"},
        optional_keys={"tools"},
        turn_keys=("prompt", "completion"),
        required_message_keys={"role", "content"},
        optional_message_keys=MESSAGE_KEYS,
    ),
    "question_answer": RowFormat(parse_question_answer, required_keys={"question", "answer"}),
    "text": RowFormat(parse_text, required_keys={"text"}),
}


def detect_format(row: Row, where: str) -> str:
    """Return the name of the format that matches the row's keys. Raises DataError with the keys if none matches, or several."""
    fitting = [name for name, row_format in FORMATS.items() if row_format.required_keys <= row.keys()]
    if len(fitting) == 1:
        if fitting == ["question_answer"] and (more := [key for key in _CONTEXT_KEYS if row.get(key)]):
            problem = f"the row has a question and an answer, and also {', '.join(more)}, which is not read ({list_keys(row)})"
            remedy = "add it to the question, or set the source's format to question_answer to train without it"
            refuse(problem, where, remedy)
        chat_keys = FORMATS[fitting[0]].chat_keys
        items = from_json(row[chat_keys[0]]) if chat_keys else None
        first = items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}
        # Files use either key for either kind of message. A message with the keys of both kinds is ShareGPT's, the later entry.
        chats = [name for name, other in FORMATS.items() if other.chat_keys and other.required_message_keys <= first.keys()]
        return (fitting + chats)[-1]
    if fitting:
        problem = f"the row fits the formats {' and '.join(fitting)} ({list_keys(row)})"
        refuse(problem, where, "set the source's format to one of them")
    remedy = (
        "give rows the key messages, conversations or text, or the keys instruction and output, prompt and completion, or "
        f"question and answer; or name the rows' own keys in the source's columns: {COLUMNS_EXAMPLE}"
    )
    refuse(f"the keys of the row match no known format ({list_keys(row)})", where, remedy)


def rename_columns(row: Row, columns: Mapping[str, str], where: str) -> Row:
    """Rename the row's keys to those of the formats, by `columns` (format's key to row's key). Raises DataError."""
    if not columns:
        return row
    values = {key: find_value(row, own_key) for key, own_key in columns.items()}
    for key, own_key in columns.items():
        if values[key] is None and own_key not in row:
            refuse(
                f"the row lacks the key {own_key}, which columns.{key} names ({list_keys(row)})",
                where,
                f"name a key that the rows have in the source's columns: {COLUMNS_EXAMPLE}",
            )
    # If another key of the row has the name of a mapped column, it is a different column. An object with a mapped key is read.
    used = {*columns, *columns.values(), *(own_key.split(".")[0] for own_key in columns.values())}
    return {key: value for key, value in row.items() if key not in used} | values


# Messages and tools


def read_messages(row: Row, key: str, where: str) -> list[Row]:
    """Return the list of message objects under `key`. Raises DataError if it is empty, or not a list of objects."""
    row = {**row, key: from_json(row[key])} if key in row else row
    items = read_value(row, key, list, where)
    if not items:
        refuse(f"{key} is empty", where, "remove the row, or write at least one message")
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            refuse(f"{key}[{i}] is {a_json_type(item)}, not an object", where, "write messages as {role, content}")
    return list(items)


def parse_message(item: Row, key_path: str, where: str) -> Message:
    """Parse a message of the format messages, at `key_path` of the row at `where`. Raises DataError."""
    raw_role = read_value(item, "role", str, where, f"{key_path}.")
    role = _OTHER_ROLES.get(raw_role, raw_role)
    if role not in ROLES:
        refuse(
            f"{key_path}.role is unknown: {safe_excerpt(raw_role)!r}", where, f"write one of {', '.join((*ROLES, *_OTHER_ROLES))}"
        )
    calls = [item["function_call"]] if item.get("function_call") else item.get("tool_calls") or []
    if calls and role != "assistant":
        refuse(f"{key_path} calls a tool, but its role is not assistant", where, "write tool_calls only in assistant messages")
    reasoning = next((k for k in _REASONING_KEYS if item.get(k) is not None), None)
    return Message(
        role,
        _parse_content(item, key_path, where, may_be_null=bool(calls)),
        tool_calls=tuple(
            parse_tool_call(call, f"{key_path}.tool_calls[{i}]", where)
            for i, call in enumerate(require_list(calls, key_path, where))
        ),
        name=read_optional(item, "name", where, f"{key_path}."),
        tool_call_id=read_optional(item, "tool_call_id", where, f"{key_path}."),
        weight=parse_weight(item, raw_role, role == "assistant", key_path, where),
        reasoning_content=None if reasoning is None else read_value(item, reasoning, str, where, f"{key_path}."),
    )


def parse_weight(item: Row, sender: str, is_assistant: bool, key_path: str, where: str) -> int | None:
    """Return 1 if an assistant's message is trained, 0 if not, None without any of WEIGHT_KEYS. Raises DataError if unclear."""
    if item.keys().isdisjoint(WEIGHT_KEYS):
        return None
    weights: dict[str, int] = {}
    for key in (*_UNREAD_WEIGHT_KEYS, *_TRAINED_KEYS, _MASKED_KEY):
        value = item.get(key)
        if value is None or value == []:
            continue
        if key in _UNREAD_WEIGHT_KEYS:
            remedy = f"write weight instead of {key}: 1 to train the whole message, 0 to leave it out"
            refuse(f"{key_path} sets its loss weight with {key}, which the launcher does not read", where, remedy)
        if value not in (0, 1):
            remedy = "write 1 to train the message, 0 to leave it out"
            refuse(f"{key_path}.{key} is {safe_excerpt(value)}, not 0 or 1", where, remedy)
        weights[key] = 1 - int(value) if key == _MASKED_KEY else int(value)
    if not weights:
        return None
    if len(set(weights.values())) > 1:
        keys = " and ".join(weights)
        refuse(f"{key_path} has keys that contradict each other about its training ({keys})", where, "keep one of the keys")
    key, weight = next(iter(weights.items()))
    if weight and not is_assistant:
        problem = f"{key_path}.{key} trains a message with the role {safe_excerpt(sender)}"
        refuse(problem, where, "remove it: only assistant messages are trained")
    return weight if is_assistant else None


def _parse_content(item: Row, key_path: str, where: str, may_be_null: bool) -> str:
    """Return the text of a message, joined from its parts; null is allowed if the assistant calls a tool."""
    content = item.get("content")
    if content is None and may_be_null:
        return ""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return str(read_value(item, "content", str, where, f"{key_path}."))
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else json_type(part)
        if not isinstance(part, dict) or kind not in _TEXT_PARTS:
            problem = f"{key_path}.content[{i}] has the type {safe_excerpt(kind)}, not text"
            refuse(problem, where, "remove the row: the launcher trains on text only")
        key = next((key for key in _PART_TEXT_KEYS if part.get(key) is not None), _PART_TEXT_KEYS[0])
        texts.append(read_value(part, key, str, where, f"{key_path}.content[{i}]."))
    return "".join(texts)


def parse_tool_call(call: Any, key_path: str, where: str) -> Row:
    """Return a tool call in the form of `Message`; accepts OpenAI's object, or the function alone. Raises DataError."""
    if not isinstance(call, dict):
        refuse(f"{key_path} is {a_json_type(call)}, not an object", where, "write {name, arguments}")
    inner = call.get("function")
    function: Row = inner if isinstance(inner, dict) else call
    name = read_value(function, "name", str, where, f"{key_path}.")
    arguments = from_json(function.get("arguments") if "arguments" in function else function.get("parameters", {}))
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        refuse(
            f"{key_path}: the arguments of {safe_excerpt(name)} are not a JSON object", where, "write an object, or its JSON text"
        )
    tool_call: Row = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **tool_call} if isinstance(call.get("id"), str) else tool_call


def parse_tools(tools: Any, where: str) -> tuple[Row, ...]:
    """Return tool definitions in OpenAI's form, from a list or its JSON text, of tools or functions alone. Raises DataError."""
    definitions = []
    for i, tool in enumerate(require_list(tools, "tools", where) if tools not in (None, "") else []):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            refuse(f"tools[{i}] does not describe a function", where, "write {name, description, parameters}")
        definitions.append(tool if "function" in tool else {"type": "function", "function": function})
    return tuple(definitions)


# Keys that no format reads


def parse_row(row: Row, source: RowSource, where: str, unread_keys: Counter[str]) -> Document:
    """Parse a row of `source`; count each unread, non-empty key of the row and of its messages in `unread_keys`.

    Raises DataError, also for keys of another kind of training, unless the source ignores them.
    """
    ignored = frozenset(source.ignored_keys)
    if ignored:
        row = {key: value for key, value in row.items() if key not in ignored}
    row = rename_columns(row, source.columns, where)
    name = detect_format(row, where) if source.format == "auto" else source.format
    row_format = FORMATS[name]
    chat_keys = [key for key in row_format.chat_keys if row.get(key) is not None]
    unread = {*(row.keys() - row_format.keys), *chat_keys[1:]}
    if name != "text":
        # Tables may hold false as text; 0 may be a class label.
        for key in (key for key in _VERDICT_KEYS if key in unread and str(row[key]).lower() == "false"):
            problem = f"{key}: false marks the answer as bad, as for KTO; the launcher would train on it as a good answer"
            _refuse_keys(problem, where, (key,))
    _refuse_media(row, unread, "the row", where)
    unread_keys.update(key for key in unread if not _is_empty(row[key]))
    unread_of_messages = set()
    for key in (*chat_keys[:1], *row_format.turn_keys):
        # The format handles anything except a list of objects.
        items = from_json(row.get(key))
        for i, item in enumerate(items if isinstance(items, list) else ()):
            if isinstance(item, dict) and not item.keys() <= row_format.message_keys:
                others = {other for other in item.keys() - row_format.message_keys if not _is_empty(item[other])}
                _refuse_media(item, others - ignored, f"{key}[{i}]", where)
                unread_of_messages |= {f"{key}[].{other}" for other in others}
    unread_keys.update(unread_of_messages)
    return row_format.parse(row, where)


def _refuse_keys(problem: str, where: str, keys: Sequence[str]) -> NoReturn:
    ignored = f"set the source's ignored_keys: [{', '.join(keys)}] in data.sources"
    refuse(problem, where, f"remove such rows; to train on the row as if it had no such key, {ignored}")


def _refuse_media(holder: Row, keys: Set[str], key_path: str, where: str) -> None:
    if media := [key for key in _MEDIA_KEYS if key in keys and _is_media(holder[key])]:
        problem = f"{key_path} has {' and '.join(media)}; the launcher trains on text only"
        _refuse_keys(problem, where, media)


def _is_empty(value: Any) -> bool:
    """Return True for a value without content; text tables hold empty lists and objects as JSON text."""
    return value is None or value in ("[]", "{}") or (isinstance(value, str | bytes | list | dict) and not value)


def _is_media(value: Any) -> bool:
    """Return True for bytes, paths or addresses; numbers and flags only describe media."""
    value = from_json(value)
    if isinstance(value, list | dict):
        return any(map(_is_media, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | bytes) and bool(value)


def redact_keys(counts: Counter[str]) -> dict[str, int]:
    """Return the counts by those excerpts of the keys that the report may show."""
    safe: Counter[str] = Counter()
    for key, count in counts.items():
        safe[safe_excerpt(key)] += count
    return dict(safe)


def rank_keys(counts: Counter[str]) -> dict[str, Any]:
    """Return the most frequent keys with their counts, sorted, as caches must not depend on sets, and the number of others."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return {"unread_keys": dict(ranked[:NUM_KEYS_SHOWN]), "num_other_unread_keys": len(ranked[NUM_KEYS_SHOWN:])}
