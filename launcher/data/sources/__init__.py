"""Reading documents from the data sources; no torch, no transformers.

A row that cannot be used is an error that names file, line and column; nothing is skipped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from launcher.config.data import DataSection, Source
from launcher.data import stdlib_docs
from launcher.errors import DataError, Problem

STDLIB_DOCS = "builtin:stdlib_docs"


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation; the assistant's messages are trained. `where` is file:line."""

    where: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion:
    """Raw text in two parts; the completion is trained. `where` is file:line."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class PlainText:
    """Raw text that is trained from end to end. `where` is file:line."""

    where: str
    text: str


Document = Chat | Completion | PlainText


def check_sources(data: DataSection) -> list[Problem]:
    """The mistakes that show without reading the files: a path that is missing, no file, or empty."""
    paths = {f"data.sources[{i}].path": source.path for i, source in enumerate(data.sources) if source.path != STDLIB_DOCS}
    if data.eval_path is not None:
        paths["data.eval_path"] = data.eval_path
    return [problem for key, path in paths.items() if (problem := _path_problem(key, path))]


def _path_problem(key: str, value: str) -> Problem | None:
    remedy = f"set {key} to a .jsonl file"
    if value.startswith("builtin:"):
        return Problem("there is no such built-in data set", key, value, f"{remedy}; the only built-in one is {STDLIB_DOCS}")
    path = Path(value).expanduser()
    if not path.exists():
        return Problem("the data file does not exist", key, value, f"{remedy}; relative paths start at {Path.cwd()}")
    if not path.is_file():
        return Problem("the data path is not a file", key, value, remedy)
    if path.stat().st_size == 0:
        return Problem("the data file is empty", key, value, f"write rows into it, or {remedy}")
    return None


def count_rows(source: Source) -> int:
    """Upper bound of the number of documents in `source`, for progress; blank lines count."""
    if source.path == STDLIB_DOCS:
        return len(stdlib_docs.pairs())
    with Path(source.path).expanduser().open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) + 1


def read_documents(source: Source) -> Iterator[tuple[Document, bool]]:
    """Yields each document with True where the source itself holds it out; errors: DataError with file:line:column."""
    if source.path == STDLIB_DOCS:
        for pair in stdlib_docs.pairs():
            messages = (Message("user", pair.question), Message("assistant", pair.answer))
            yield Chat(f"{STDLIB_DOCS}:{pair.symbol}", messages), pair.held_out
        return
    parse: Callable[[dict[str, Any], str], Document] | None = PARSERS.get(source.format)
    with Path(source.path).expanduser().open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{source.path}:{number}"
            row = _parse_line(line, where)
            if parse is None:
                parse = PARSERS[_recognise(row, where)]
            yield parse(row, where), False


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        _refuse("the line is not UTF-8 text", f"{where}:{column}", "save the file in UTF-8")
    except json.JSONDecodeError as error:
        _refuse(f"the line is not JSON: {error.msg}", f"{where}:{error.colno}", "write one complete JSON object per line")
    if not isinstance(row, dict):
        _refuse(f"the line holds a {_json_name(row)}, not an object", f"{where}:1", "write one JSON object per line")
    return row


def _recognise(row: dict[str, Any], where: str) -> str:
    """The format whose keys the row has."""
    formats = {"messages": {"messages"}, "prompt_completion": {"prompt", "completion"}, "text": {"text"}}
    fitting = [name for name, keys in formats.items() if keys <= row.keys()]
    if len(fitting) == 1:
        return fitting[0]
    found = f"its keys are {', '.join(sorted(row)) or 'none'}"
    if fitting:
        remedy = "set the source's format to one of them"
        _refuse(f"the row fits the formats {' and '.join(fitting)} ({found})", f"{where}:1", remedy)
    remedy = "give rows the key messages, prompt and completion, or text"
    _refuse(f"the row has the keys of no known format ({found})", f"{where}:1", remedy)


def _chat(row: dict[str, Any], where: str) -> Chat:
    messages = _value(row, "messages", list, where)
    if not messages:
        _refuse("messages is empty", f"{where}:1", "remove the row, or write at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            _refuse(f"messages[{i}] is a {_json_name(message)}, not an object", f"{where}:1", "write messages as {role, content}")
    return Chat(
        where,
        tuple(
            Message(*(_value(message, key, str, where, f"messages[{i}].") for key in ("role", "content")))
            for i, message in enumerate(messages)
        ),
    )


def _completion(row: dict[str, Any], where: str) -> Completion:
    return Completion(where, _value(row, "prompt", str, where), _value(row, "completion", str, where))


def _plain_text(row: dict[str, Any], where: str) -> PlainText:
    return PlainText(where, _value(row, "text", str, where))


PARSERS: dict[str, Callable[[dict[str, Any], str], Document]] = {
    "messages": _chat,
    "prompt_completion": _completion,
    "text": _plain_text,
}


def _value(row: dict[str, Any], key: str, kind: type, where: str, inside: str = "") -> Any:
    if key not in row:
        found = f"found: {', '.join(sorted(row)) or 'none'}"
        _refuse(f"the row lacks the key {inside}{key} ({found})", f"{where}:1", "add the key, or set the source's format")
    value = row[key]
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "text"
        _refuse(f"{inside}{key} is a {_json_name(value)}, not {wanted}", f"{where}:1", f"write {inside}{key} as {wanted}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            _refuse(f"{inside}{key} holds half of a surrogate pair", f"{where}:1", "write the character whole, in UTF-8")
    return value


def _json_name(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


def _refuse(what: str, where: str, remedy: str) -> NoReturn:
    raise DataError(Problem(what, where=where, remedy=remedy))
