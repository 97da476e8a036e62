"""Parses the messages and tool definitions of a row: roles, text, tool calls, loss weights. Pure."""

from __future__ import annotations

from typing import Any

from launcher.data.sources.documents import ROLES, Message
from launcher.data.sources.row_values import (
    Row,
    a_json_type,
    from_json,
    json_type,
    read_optional,
    read_value,
    refuse,
    require_list,
    safe_excerpt,
)

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
    """Parse a message of the format messages; `key_path` is as in messages[0], and `where` the place of the row.

    Raises:
        DataError: if the role is unknown, the content is not text, or a tool call or loss weight is malformed.
    """
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
    """Return 1 if an assistant's message is trained and 0 if not, by any of WEIGHT_KEYS; None if it has none of these keys.

    Raises:
        DataError: for a weight between 0 and 1, contradictory keys, or a trained message of another role.
    """
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
        # OpenAI's assistants write the text as an object with its annotations.
        holder, prefix = (part[key], f"{key}.") if isinstance(part.get(key), dict) else (part, "")
        texts.append(read_value(holder, "value" if prefix else key, str, where, f"{key_path}.content[{i}].{prefix}"))
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
