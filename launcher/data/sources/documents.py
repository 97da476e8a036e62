"""Documents, which are the content of a row independent of its format, and reading values from a row. Pure, picklable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from launcher.config.sections.data import COLUMNS_EXAMPLE
from launcher.data.checks import patterns
from launcher.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `role` is one of ROLES.

    `tool_calls` of an assistant are {"type": "function", "function": {"name", "arguments"}}, with an "id" if the row has one, and
    the arguments as a mapping. `weight` is 1 or 0 if an assistant's message is trained or not; with None, the settings decide.
    """

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: int | None = None
    reasoning_content: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A chat, or raw text; `where` is file:line, or file:row N in a file without lines.

    A chat has `messages`, of which the assistant's are trained; `tools` are the functions that it may call, in OpenAI's form.
    Anything else is `text`, which is trained, after a `prompt`, which is not. `columns` are values of further columns of
    launcher.data.schema, by name.
    """

    where: str
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    text: str = ""
    columns: Mapping[str, float] = field(default_factory=dict)


# Values of rows

Row = dict[str, Any]

_EXCERPT_CHARS = 40
# A row may have a million keys.
_MAX_KEYS = 30
_MISSING_REMEDY = f"add the key, set the source's format, or name the row's own key in the source's columns: {COLUMNS_EXAMPLE}"


def read_value(row: Row, key: str, kind: type, where: str, prefix: str = "") -> Any:
    """Return `row[key]`, or raise DataError if it is not a `kind`; `prefix` is the key path of `row` in the whole row."""
    if key not in row:
        # A source's format and columns concern the keys of the row, not those of its messages.
        remedy = f"write {prefix}{key}, or remove the row" if prefix else _MISSING_REMEDY
        refuse(f"the row lacks the key {prefix}{key} ({list_keys(row)})", where, remedy)
    value = row[key]
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind):
        wanted = {list: "a list", str: "text", float: "a number"}[kind]
        refuse(f"{prefix}{key} is {a_json_type(value)}, not {wanted}", where, f"write {prefix}{key} as {wanted}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            refuse(f"{prefix}{key} holds half of a surrogate pair", where, "write the character whole, in UTF-8")
    return value


def read_optional(row: Row, key: str, where: str, prefix: str = "") -> str | None:
    """Return the text of `row[key]`; None if it is missing or null. Raises DataError."""
    return None if row.get(key) is None else str(read_value(row, key, str, where, prefix))


def find_value(row: Row, path: str) -> Any:
    """Return a key's value, also inside objects and lists, which may be JSON text (data.question, turns.0); None if missing."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        value = from_json(value)
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def require_list(value: Any, key: str, where: str) -> list[Any]:
    """Return a list, parsed if it is JSON text. Raises DataError if it is not a list."""
    value = from_json(value)
    if not isinstance(value, list):
        refuse(f"{key} is {a_json_type(value)}, not a list", where, f"write {key} as a list")
    return value


def from_json(value: Any) -> Any:
    """Parse a list or object that a table holds as JSON text; return any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def list_keys(row: Row) -> str:
    """Return the row's keys for an error message."""
    return f"found: {list_names(sorted(row)) or 'none'}"


def list_names(names: Sequence[str]) -> str:
    """Return the first names of keys or columns for an error message."""
    shown = ", ".join(map(safe_excerpt, names[:_MAX_KEYS]))
    return shown if len(names) <= _MAX_KEYS else f"{shown} and {len(names) - _MAX_KEYS:,} more"


def safe_excerpt(value: object) -> str:
    """Return the first characters of a value for an error message, with secrets and personal data redacted."""
    text = str(value)
    # Redact before cutting, because the patterns do not recognize half a key.
    safe = " ".join(patterns.redact([text])[0].split())
    return safe if len(safe) <= _EXCERPT_CHARS else f"{safe[:_EXCERPT_CHARS]}… ({len(text):,} characters)"


def json_type(value: object) -> str:
    """Return the JSON name of the type of `value`."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def a_json_type(value: object) -> str:
    """Return the JSON name of the type of `value` with its article."""
    name = json_type(value)
    return name if name == "null" else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def refuse(problem: str, where: str, remedy: str) -> NoReturn:
    """Raise DataError with the `problem` at the place `where` (file:line), and how to fix it."""
    raise DataError(problem, where=where, remedy=remedy)
