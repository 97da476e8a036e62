"""JSON objects as dataclasses: the field types define what the decoder accepts.

Supported types: bool, int, float, str, None, Any, enumerations, nested dataclasses, dictionaries with text keys, tuples, and
unions. An integer is accepted for a float; a boolean is not a number.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from launcher.errors import DamagedRun, UnreadableRun
from launcher.runs import atomic_files

T = TypeVar("T")

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null", dict: "an object"}
_MAX_VALUE_CHARS = 80


class _FieldError(Exception):
    """A value does not fit the type of its field, or there is none."""

    def __init__(self, field: str, problem: str, *value: Any) -> None:
        self.field, self.problem, shown = field, problem, "".join(json.dumps(one, default=str) for one in value)
        self.value = shown if len(shown) <= _MAX_VALUE_CHARS else f"{shown[:_MAX_VALUE_CHARS]}..."


def decode(record_type: type[T], values: Any, where: str, remedy: str = "") -> T:
    """Build a `record_type` from a decoded JSON value. Unknown keys are ignored; missing keys get the field's default.

    Raises:
        DamagedRun: if a key without a default is missing, or a value has the wrong type; names `where`, the field and the value.
    """
    try:
        record: T = _decode_object(record_type, values, "")
    except _FieldError as error:
        location = f"{where}: {error.field}" if error.field else where
        message = f"a record of the run is damaged: {error.problem}"
        raise DamagedRun(message, where=location, value=error.value, remedy=remedy) from None
    return record


def encode(record: Any) -> dict[str, Any]:
    """Return the JSON object of a record, with every field."""
    return dataclasses.asdict(record)


def read(record_type: type[T], path: Path, remedy: str = "") -> T:
    """Read one record.

    Raises:
        DamagedRun: if the file is missing, cannot be read, or is damaged.
    """
    return decode(record_type, read_json(path, remedy), str(path), remedy)


def read_if_present(record_type: type[T], path: Path, remedy: str = "") -> T | None:
    """Read one record, or None if there is no such file. Raises what `read` raises."""
    return read(record_type, path, remedy) if path.is_file() else None


def write(path: Path, record: Any) -> None:
    """Replace the file at `path` with this record, atomically."""
    atomic_files.write_json(path, encode(record))


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        DamagedRun: if the file is missing, cannot be read, or holds anything else.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise DamagedRun("a file of the run is missing", where=str(path), remedy=remedy) from None
    except OSError as error:
        raise unreadable(path, error) from None
    return _parse(content, str(path), remedy)


def unreadable(path: Path, error: OSError) -> UnreadableRun:
    """Return the error of a file that storage does not give out."""
    remedy = "check the storage and the permissions, then try again"
    return UnreadableRun(f"a file of the run cannot be read: {error.strerror}", where=str(path), remedy=remedy)


def loads(record_type: type[T], content: bytes, where: str) -> T:
    """Decode one record from JSON that does not come from a local file. Raises what `read` raises; `where` names the source."""
    return decode(record_type, _parse(content, where), where)


def _parse(content: bytes, where: str, remedy: str = "") -> dict[str, Any]:
    try:
        value = json.loads(content.decode())
    except ValueError as error:
        raise DamagedRun(f"a file of the run is damaged: {error}", where=where, remedy=remedy) from None
    if not isinstance(value, dict):
        raise DamagedRun("a file of the run is damaged: it is not a JSON object", where=where, remedy=remedy)
    return value


def read_bytes(path: Path) -> bytes:
    """Read a file that other processes replace."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        # On NFS, another machine replaced the file after it was opened.
        return path.read_bytes()


@functools.cache
def _list_fields(record_type: type) -> tuple[tuple[str, Any, bool], ...]:
    """Name and type of each field that a constructor takes, and whether the field has a default."""
    hints, missing = get_type_hints(record_type), dataclasses.MISSING
    return tuple(
        (field.name, hints[field.name], field.default is not missing or field.default_factory is not missing)
        for field in dataclasses.fields(record_type)
        if field.init
    )


def _decode_object(record_type: Any, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise _FieldError(path, "expected an object", values)
    arguments = {}
    for name, kind, has_default in _list_fields(record_type):
        field = f"{path}.{name}" if path else name
        if name in values:
            arguments[name] = _decode_value(kind, values[name], field)
        elif not has_default:
            raise _FieldError(field, "this field is missing")
    return record_type(**arguments)


def _decode_value(kind: Any, value: Any, path: str) -> Any:
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        *first, last = (option for option in arguments if option is not NoneType)
        for option in first:
            with suppress(_FieldError):
                return _decode_value(option, value, path)
        return _decode_value(last, value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _FieldError(path, "expected a list", value)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) != len(value):
            raise _FieldError(path, f"expected a list of {len(arguments)} values", value)
        return tuple(
            _decode_value(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(arguments, value, strict=True))
        )
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _FieldError(path, "expected an object", value)
        return {name: _decode_value(arguments[1], item, f"{path}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_object(kind, value, path)
    if issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            raise _FieldError(path, f"expected one of {', '.join(str(member.value) for member in kind)}", value) from None
    raise _FieldError(path, f"expected {_NAMES[kind]}", value)
