"""The row formats: how a row becomes a document, and which keys identify a format. Pure.

To add a format, write a function (row, place) -> Document and give it an entry in `FORMATS`. To let users select it by name, add
the name to `Source.format` in launcher/config/sections/data.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

from launcher.config.sections.data import COLUMNS_EXAMPLE
from launcher.data.sources.documents import Chat, Completion, Document, Message, PlainText
from launcher.data.sources.messages import (
    MESSAGE_KEYS,
    WEIGHT_KEYS,
    parse_message,
    parse_tool_call,
    parse_tools,
    parse_weight,
    read_messages,
)
from launcher.data.sources.row_values import (
    Row,
    find_value,
    from_json,
    list_keys,
    read_optional,
    read_value,
    refuse,
    require_list,
    safe_excerpt,
)

# ShareGPT's names for ROLES, and for an assistant message that calls a tool.
_SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "model": "assistant", "bing": "assistant", "chatgpt": "assistant"},
    **{"function_call": "function_call", "tool_call": "function_call"},
    **{"observation": "tool", "tool": "tool", "function_response": "tool", "tool_response": "tool"},
}


# Keys for the subject of a question, which the format question_answer does not read.
_CONTEXT_KEYS = ("context", "passage", "paragraph", "document", "article", "story", "evidence", "choices", "options")


@dataclass(frozen=True)
class RowFormat:
    """How rows of one format are recognized and parsed.

    `parse(row, place)` returns the document, or raises DataError with the place. A row with all `required_keys` has this format;
    `parse` also reads `optional_keys`. For a format of messages, `chat_keys` are the keys that may hold the list of messages, its
    own first. A message has `required_message_keys`; `parse` also reads `optional_message_keys`. `turn_keys` hold either text or
    a list of messages.
    """

    parse: Callable[[Row, str], Document]
    required_keys: frozenset[str]
    optional_keys: frozenset[str] = frozenset()
    chat_keys: tuple[str, ...] = ()
    turn_keys: tuple[str, ...] = ()
    required_message_keys: frozenset[str] = frozenset()
    optional_message_keys: frozenset[str] = frozenset()

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        return self.required_keys | self.optional_keys

    @functools.cached_property
    def message_keys(self) -> frozenset[str]:
        return self.required_message_keys | self.optional_message_keys


def parse_messages(row: Row, where: str) -> Chat:
    """Parse a list of {role, content}, as in OpenAI's fine-tuning files."""
    key = find_chat_key(row, "messages")
    items = read_messages(row, key, where)
    messages = tuple(parse_message(item, f"{key}[{i}]", where) for i, item in enumerate(items))
    tools = row.get("tools") if row.get("tools") is not None else row.get("functions")
    return Chat(where, _add_system(row, messages, where), parse_tools(tools, where))


def parse_sharegpt(row: Row, where: str) -> Chat:
    """Parse a list of {from, value}."""
    key = find_chat_key(row, "sharegpt")
    messages = []
    for i, item in enumerate(read_messages(row, key, where)):
        key_path = f"{key}[{i}]"
        sender, value = (
            read_value(item, "from", str, where, f"{key_path}."),
            read_value(item, "value", str, where, f"{key_path}."),
        )
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
    return Chat(where, _add_system(row, tuple(messages), where), parse_tools(row.get("tools"), where))


def parse_alpaca(row: Row, where: str) -> Chat:
    """Parse instruction, input and output; `history` has earlier pairs of question and answer.

    The input follows the instruction after an empty line.
    """
    earlier: list[Message] = []
    for i, pair in enumerate(require_list(row.get("history") or [], "history", where)):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            refuse(f"history[{i}] is not a pair of texts", where, "write [question, answer]")
        earlier += [Message("user", pair[0]), Message("assistant", pair[1])]
    instruction, extra = read_value(row, "instruction", str, where), read_optional(row, "input", where)
    question = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    messages = (*earlier, Message("user", question), Message("assistant", read_value(row, "output", str, where)))
    return Chat(where, _add_system(row, messages, where), parse_tools(row.get("tools"), where))


def parse_completion(row: Row, where: str) -> Completion | Chat:
    """Parse a prompt and its completion: two texts, or two lists of messages, of which the completion is trained (TRL)."""
    tools = parse_tools(row.get("tools"), where)
    if not tools and not any(isinstance(row.get(key), list) for key in ("prompt", "completion")):
        return Completion(where, read_value(row, "prompt", str, where), read_value(row, "completion", str, where))
    earlier, answer = _parse_turns(row, "prompt", "user", where), _parse_turns(row, "completion", "assistant", where)
    if not any(message.role == "assistant" for message in answer):
        refuse("completion has no message with the role assistant", where, "write the answer as an assistant's message")
    earlier = [replace(message, weight=0) if message.role == "assistant" else message for message in earlier]
    return Chat(where, (*earlier, *answer), tools)


def _parse_turns(row: Row, key: str, role: str, where: str) -> list[Message]:
    """Return the messages under `key`: a list of messages, or the text of one message of `role`; an empty text gives none."""
    if isinstance(row.get(key), list):
        return [parse_message(item, f"{key}[{i}]", where) for i, item in enumerate(read_messages(row, key, where))]
    text = read_value(row, key, str, where)
    return [Message(role, text)] if text else []


def parse_question_answer(row: Row, where: str) -> Completion:
    """Parse a question and its answer."""
    return Completion(where, read_value(row, "question", str, where), read_value(row, "answer", str, where))


def parse_text(row: Row, where: str) -> PlainText:
    """Parse plain text."""
    return PlainText(where, read_value(row, "text", str, where))


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
        required_keys=frozenset({"messages"}),
        optional_keys=frozenset({"conversations", "system", "tools", "functions"}),
        chat_keys=("messages", "conversations"),
        required_message_keys=frozenset({"role", "content"}),
        optional_message_keys=MESSAGE_KEYS,
    ),
    "sharegpt": RowFormat(
        parse_sharegpt,
        required_keys=frozenset({"conversations"}),
        optional_keys=frozenset({"messages", "system", "tools"}),
        chat_keys=("conversations", "messages"),
        required_message_keys=frozenset({"from", "value"}),
        optional_message_keys=WEIGHT_KEYS,
    ),
    "alpaca": RowFormat(
        parse_alpaca,
        required_keys=frozenset({"instruction", "output"}),
        optional_keys=frozenset({"input", "history", "system", "tools"}),
    ),
    "prompt_completion": RowFormat(
        parse_completion,
        required_keys=frozenset({"prompt", "completion"}),
        optional_keys=frozenset({"tools"}),
        turn_keys=("prompt", "completion"),
        required_message_keys=frozenset({"role", "content"}),
        optional_message_keys=MESSAGE_KEYS,
    ),
    "question_answer": RowFormat(parse_question_answer, required_keys=frozenset({"question", "answer"})),
    "text": RowFormat(parse_text, required_keys=frozenset({"text"})),
}


def detect_format(row: Row, where: str) -> str:
    """Return the name of the format that matches the row's keys.

    Raises:
        DataError: with the row's keys, if no format matches, or several do.
    """
    fitting = [name for name, row_format in FORMATS.items() if row_format.required_keys <= row.keys()]
    if len(fitting) == 1:
        if fitting == ["question_answer"] and (more := [key for key in _CONTEXT_KEYS if row.get(key)]):
            problem = f"the row has a question and an answer, and also {', '.join(more)}, which is not read ({list_keys(row)})"
            remedy = "add it to the question, or set the source's format to question_answer to train without it"
            refuse(problem, where, remedy)
        return _detect_by_message(row, fitting[0])
    if fitting:
        problem = f"the row fits the formats {' and '.join(fitting)} ({list_keys(row)})"
        refuse(problem, where, "set the source's format to one of them")
    remedy = (
        "give rows the key messages, conversations or text, or the keys instruction and output, prompt and completion, or "
        f"question and answer; or name the rows' own keys in the source's columns: {COLUMNS_EXAMPLE}"
    )
    refuse(f"the keys of the row match no known format ({list_keys(row)})", where, remedy)


def _detect_by_message(row: Row, format: str) -> str:
    """Choose between chat formats by the keys of the first message: files use either row key for either kind of message."""
    chat_keys = FORMATS[format].chat_keys
    items = from_json(row[chat_keys[0]]) if chat_keys else None
    first = items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}
    # A message with the keys of both kinds is ShareGPT's, the later entry.
    for name, row_format in reversed(FORMATS.items()):
        if row_format.chat_keys and row_format.required_message_keys <= first.keys():
            return name
    return format


def find_chat_key(keys: Container[str], format: str) -> str:
    """Return which key of a row holds its messages, for a format with `chat_keys`."""
    chat_keys = FORMATS[format].chat_keys
    return next((key for key in chat_keys if key in keys), chat_keys[0])


def rename_columns(row: Row, columns: Mapping[str, str], where: str) -> Row:
    """Rename the row's own keys to those of the formats, by `columns` (format's key to row's key).

    Raises:
        DataError: if the row lacks a key that `columns` names.
    """
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
    # If another key of the row has the name of a mapped column, it is a different column.
    rest = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
    return {**rest, **values}
