"""Reads the objects of a JSON array one by one: memory holds one object and one block, whatever the size of the file."""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from launcher.data.sources.row_values import MAX_ROW_BYTES, Row, refuse, safe_excerpt

_BLOCK_BYTES = 1 << 20
# A parse error this far before the end of the text is not due to incomplete input, except in an unterminated string.
_LONGEST_WORD = 16
_UNTERMINATED = "Unterminated string"
_IS_CUT = "write one JSON array of objects; check that the file is complete"


class _Text:
    """The text of a file from the first character that is still needed: `text` from index `at` on."""

    def __init__(self, file: io.BufferedReader, name: str) -> None:
        self._file, self._name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line, self._column = 1, 1
        self.text, self.at = "", 0
        self._is_first = True

    def read(self, num_bytes: int) -> bool:
        """Read `num_bytes` more; return False at the end of the file."""
        self._line, self._column = self._locate(self.at)
        self.text, self.at = self.text[self.at :], 0
        block = self._file.read(num_bytes)
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode("utf-8")
            message = f"the line is not UTF-8 text (byte 0x{error.object[error.start]:02x})"
            refuse(message, self.place(len(self.text)), "save the file in UTF-8")
        # Some programs write a byte order mark before the first character.
        self.text += text.removeprefix("\ufeff") if self._is_first else text
        self._is_first = False
        return bool(block)

    def next_character(self) -> str:
        """Move `at` to the next non-whitespace character and return it; empty at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read(_BLOCK_BYTES):
                return ""

    def value(self) -> tuple[Any, int]:
        """Parse the value at `at` and move past it; return it with its number of characters. Raises JSONDecodeError."""
        num_bytes, is_all = _BLOCK_BYTES, False
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_wrong = error.pos < len(self.text) - _LONGEST_WORD and not error.msg.startswith(_UNTERMINATED)
                if is_wrong or is_all:
                    raise
                if (num_left := MAX_ROW_BYTES + 1 - (len(self.text) - self.at)) <= 0:
                    refuse(f"the entry is longer than {MAX_ROW_BYTES >> 20} MiB", self.place(self.at), _IS_CUT)
                is_all = not self.read(min(num_bytes, num_left))
                # Double the size, so that an object of many blocks is not parsed once per block.
                num_bytes *= 2
            else:
                num_chars, self.at = end - self.at, end
                return value, num_chars

    def place(self, at: int) -> str:
        """Return the place (file:line:column) of the character at index `at`."""
        line, column = self._locate(at)
        return f"{self._name}:{line}:{column}"

    def _locate(self, at: int) -> tuple[int, int]:
        breaks = self.text.count("\n", 0, at)
        return (self._line + breaks, at - self.text.rfind("\n", 0, at)) if breaks else (self._line, self._column + at)


class RepeatedKeyError(ValueError):
    """An object has a key twice: it is undefined which of the values holds, and most parsers silently take the last one."""


def _make_object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise RepeatedKeyError(key)
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)
parse_json = _DECODER.decode


def read_array(file: io.BufferedReader, name: str) -> Iterator[tuple[Row, str, int]]:
    """Yield (object, place, number of characters) of each entry of the array in `file`. Raises DataError with the place."""
    text = _Text(file, name)
    text.next_character()
    text.at += 1
    number, character = 0, text.next_character()
    while character != "]":
        number += 1
        row, num_chars = _entry(text, name, number)
        yield row, f"{name}:row {number}", num_chars
        character = text.next_character()
        if character == ",":
            text.at += 1
            text.next_character()
        elif character != "]":
            refuse("the file is not JSON: Expecting ',' delimiter", text.place(text.at), _IS_CUT)
    text.at += 1
    if text.next_character():
        refuse("the file is not JSON: Extra data", text.place(text.at), "write one JSON array of objects")


def _entry(text: _Text, name: str, number: int) -> tuple[Row, int]:
    try:
        value, num_chars = text.value()
    except json.JSONDecodeError as error:
        refuse(f"the file is not JSON: {error.msg}", text.place(error.pos), _IS_CUT)
    except (RecursionError, ValueError) as error:
        refuse_limit("the entry", error, f"{name}:row {number}")
    if not isinstance(value, dict):
        refuse("an entry of the JSON array is not an object", f"{name}:row {number}", "write an array of objects")
    return value, num_chars


def refuse_limit(subject: str, error: Exception, where: str) -> NoReturn:
    """Refuse well-formed JSON that cannot be used, because of its parser's `error`. Raises DataError."""
    if isinstance(error, RepeatedKeyError):
        refuse(f"{subject} has the key {safe_excerpt(error)} twice in one object", where, "remove one of the two")
    limit = "is nested too deeply" if isinstance(error, RecursionError) else "holds a number with too many digits"
    refuse(f"{subject} {limit}", where, "remove the row")
