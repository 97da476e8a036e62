"""Reads rows from files: jsonl, json, csv, parquet and txt, plain or compressed with gzip or zstd.

A file is cut into blocks of rows, unparsed if possible, so that worker processes can parse them. A file's first bytes show its
compression. Its name, or otherwise its first bytes, show its kind.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from launcher.data.sources import foreign_files, parquet
from launcher.data.sources.json_array import parse_json, read_array, refuse_limit
from launcher.data.sources.row_values import HARMLESS_BYTES, MAX_EXPANSION, MAX_ROW_BYTES, Row, a_json_type, list_names, refuse

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "txt"}
COMPRESSED = (".gz", ".zst")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
# Size of a read, and of a block of rows.
_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 4096
BLOCK_ROWS = 256
_ONE_OBJECT = "write one JSON object per line, or one array of objects"
_SAVE_AS_UTF8 = "save the file in UTF-8"


@dataclass(frozen=True)
class DataFile:
    """A file on this machine; `name` is the name that the user knows."""

    path: Path
    name: str


def detect_kind(name: str) -> str | None:
    """Return one of the values of KINDS, by the file's name without its compression suffix; None for any other suffix."""
    return KINDS.get(_decompressed_name(name.lower()).suffix)


def strip_suffixes(name: str) -> str:
    """Return the path of the file without the suffixes for its kind and compression."""
    return _decompressed_name(name).with_suffix("").as_posix()


def _decompressed_name(name: str) -> Path:
    path = Path(name)
    return path.with_suffix("") if path.suffix in COMPRESSED else path


@dataclass(frozen=True, slots=True)
class Block:
    """Up to BLOCK_ROWS consecutive rows of a file; picklable.

    `data` contains the lines of a jsonl or txt file, or a part of a parquet table as an Arrow stream; `first` is the number of
    the first line or row. If finding the rows requires parsing the file, `data` contains the rows with their places.
    """

    kind: str
    name: str
    first: int
    data: bytes | tuple[tuple[Row, str], ...]


def read_blocks(path: Path, name: str) -> Iterator[Block]:
    """Yield the rows of a file, in order, in blocks of at most about a megabyte; `name` is the file's name for the user.

    Raises:
        DataError: with the place, if a file is unreadable, truncated or corrupt, or a table or array cannot be parsed.
    """
    with _opened(path, name) as file:
        kind = _kind(file, name)
        if kind in _LINES:
            yield from _blocks_of_lines(file, name, kind)
        elif kind == "parquet":
            yield from (Block(kind, name, first, data) for first, data in parquet.read_parts(file, name))
        else:
            yield from _blocks_of_rows(_csv(file, name) if kind == "csv" else read_array(file, name), name, kind)


def parse_block(block: Block) -> Iterator[tuple[Row, str]]:
    """Yield each row of a block with its place, file:line or file:row N. Raises DataError with the place."""
    if not isinstance(block.data, bytes):
        yield from block.data
    elif block.kind == "parquet":
        yield from parquet.parse_part(block.data, block.name, block.first)
    else:
        yield from _LINES[block.kind](enumerate(io.BytesIO(block.data), start=block.first), block.name)


def split_block(block: Block) -> Iterator[Block]:
    """Yield a block for each row of `block`. Raises DataError if a part of a table cannot be read."""
    if isinstance(block.data, bytes) and block.kind in _LINES:
        for number, line in enumerate(io.BytesIO(block.data), start=block.first):
            yield Block(block.kind, block.name, number, line)
    else:
        for number, row in enumerate(parse_block(block), start=block.first):
            yield Block(block.kind, block.name, number, (row,))


def _blocks_of_lines(file: io.BufferedReader, name: str, kind: str) -> Iterator[Block]:
    lines: list[bytes] = []
    first, num_bytes = 1, 0
    for line in read_lines(file, name):
        lines.append(line)
        num_bytes += len(line)
        if len(lines) == BLOCK_ROWS or num_bytes >= _BLOCK_BYTES:
            yield Block(kind, name, first, b"".join(lines))
            first, num_bytes = first + len(lines), 0
            lines.clear()
    if lines:
        yield Block(kind, name, first, b"".join(lines))


def read_lines(file: io.BufferedReader, name: str) -> Iterator[bytes]:
    """Yield the lines of a file. Raises DataError if a line is too long."""
    for number in itertools.count(1):
        line = file.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_ROW_BYTES:
            remedy = "write one row per line, and shorten the rows"
            refuse(f"the line is longer than {MAX_ROW_BYTES >> 20} MiB", f"{name}:{number}", remedy)
        yield line


def _blocks_of_rows(rows: Iterator[tuple[Row, str, int]], name: str, kind: str) -> Iterator[Block]:
    """Group rows into blocks; each row comes with its place and its number of characters."""
    block: list[tuple[Row, str]] = []
    first, num_chars = 1, 0
    for row, place, size in rows:
        block.append((row, place))
        num_chars += size
        if len(block) == BLOCK_ROWS or num_chars >= _BLOCK_BYTES:
            yield Block(kind, name, first, tuple(block))
            first, num_chars = first + len(block), 0
            block.clear()
    if block:
        yield Block(kind, name, first, tuple(block))


def count_rows(path: Path, name: str) -> int:
    """Return an upper bound of the number of rows, without parsing them. Raises DataError as `read_blocks` does."""
    with _opened(path, name) as file:
        kind = _kind(file, name)
        if kind == "parquet":
            return parquet.count_rows(file, name)
        # Every object of a JSON array has an opening brace.
        separator = b"{" if kind == "json" else b"\n"
        count, last = 0, separator
        for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
            count, last = count + block.count(separator), block[-1:]
        # The last line may lack a line end.
        return count + (kind != "json" and last != separator)


def unreadable(error: OSError, name: str) -> NoReturn:
    """Refuse a file that the system cannot read."""
    message = f"the data file cannot be read: {error.strerror or error}"
    refuse(message, name, "check the permissions of the file, and the disk or network that it is on")


def file_digest(file: DataFile) -> str:
    """Return a hex digest of the file's bytes. Raises DataError."""
    state = xxhash.xxh3_128()
    try:
        with file.path.open("rb") as opened:
            for block in iter(lambda: opened.read(_BLOCK_BYTES), b""):
                state.update(block)
    except OSError as error:
        unreadable(error, file.name)
    return state.hexdigest()


@contextmanager
def _opened(path: Path, name: str) -> Iterator[io.BufferedReader]:
    try:
        with path.open("rb", buffering=0) as raw, _decompressed(raw, name) as file:
            yield file
    except OSError as error:
        unreadable(error, name)


@contextmanager
def _decompressed(raw: io.FileIO, name: str) -> Iterator[io.BufferedReader]:
    head = raw.read(4)
    raw.seek(0)
    codec = next((codec for magic, codec in _MAGIC.items() if head.startswith(magic)), None)
    if codec is None:
        yield io.BufferedReader(raw, _BLOCK_BYTES)
        return
    import pyarrow

    try:
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), codec)
        yield io.BufferedReader(_Decompressed(stream, raw, name), _BLOCK_BYTES)
    except OSError as error:
        at, size = raw.tell(), os.fstat(raw.fileno()).st_size
        if "Truncated" in str(error):
            message, place = f"the {codec} stream ends early: the file is truncated", f"{name}, byte {size}"
        else:
            message, place = f"the {codec} stream is corrupt: {error}", f"{name}, before byte {at}"
        refuse(message, place, "copy or download the file again", value=f"{size} bytes")


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, as long as its size is in proportion to the file."""

    def __init__(self, stream: Any, raw: io.FileIO, name: str) -> None:
        self._stream, self._raw, self._name = stream, raw, name
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._num_bytes += len(content)
        if self._num_bytes > max(HARMLESS_BYTES, MAX_EXPANSION * self._raw.tell()):
            message = f"the compressed file expands to more than {MAX_EXPANSION} times its size"
            refuse(message, self._name, "if you trust the file, decompress it and read the result")
        return len(content)


def _kind(file: io.BufferedReader, name: str) -> str:
    """Return the kind of a file. For .json and .jsonl, trust the content over the name: one array, or lines of objects."""
    kind = detect_kind(name) or _kind_by_content(file, name)
    foreign_files.refuse_foreign_content(file.peek(_BLOCK_BYTES)[:_HEAD_BYTES], name, kind)
    if kind in ("json", "jsonl"):
        return "json" if _begins_array_of_rows(file.peek(_BLOCK_BYTES)) else "jsonl"
    return kind


def _begins_array_of_rows(head: bytes) -> bool:
    """Return whether a file with this start is one JSON array. If more follows a line that is an array, each line is a row."""
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        return False
    line, _, rest = head.partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


def _kind_by_content(file: io.BufferedReader, name: str) -> str:
    head = file.peek(64)
    if head.startswith(b"PAR1"):
        return "parquet"
    first = head.lstrip()[:1]
    if first in (b"{", b"["):
        return "jsonl" if first == b"{" else "json"
    if head.startswith(b"version https://git-lfs"):
        # The caller refuses it, whatever its kind.
        return "txt"
    endings = (
        f"give the file one of the extensions {', '.join(KINDS)}, with {' or '.join(COMPRESSED)} after it if it is compressed"
    )
    foreign_files.refuse_unknown_kind(name, endings)


def _json_lines(lines: Iterable[tuple[int, bytes]], name: str) -> Iterator[tuple[Row, str]]:
    for number, line in lines:
        text = _decoded(line, name, number).rstrip("\r\n")
        if not text or text.isspace():
            continue
        try:
            row = parse_json(text)
        except json.JSONDecodeError as error:
            refuse(f"the line is not JSON: {error.msg}", f"{name}:{number}:{error.colno}", _remedy_of_line(text, error))
        except (RecursionError, ValueError) as error:
            refuse_limit("the line", error, f"{name}:{number}")
        if isinstance(row, list):
            refuse("the line holds a JSON array, not an object", f"{name}:{number}", _ONE_OBJECT)
        if not isinstance(row, dict):
            refuse(f"the line holds {a_json_type(row)}, not an object", f"{name}:{number}", _ONE_OBJECT)
        yield row, f"{name}:{number}"


def _remedy_of_line(text: str, error: json.JSONDecodeError) -> str:
    """Return how to repair a line that is not JSON."""
    if text[error.pos :].strip() == ",":
        return "write one complete JSON object per line, without a comma after it"
    if text.startswith("{'"):
        return "write one complete JSON object per line, with double quotes: in Python, json.dumps(row)"
    return "write one complete JSON object per line"


def _csv(file: io.BufferedReader, name: str) -> Iterator[tuple[Row, str, int]]:
    """Yield (row, place, number of characters) of each line after the first line, which names the columns."""
    csv.field_size_limit(sys.maxsize)
    header: list[str] | None = None
    start, num_bytes = 1, 0

    def lines() -> Iterator[str]:
        nonlocal num_bytes
        for number, line in enumerate(read_lines(file, name), start=1):
            num_bytes += len(line)
            if num_bytes > MAX_ROW_BYTES:
                remedy = "close every quote, or write shorter rows"
                refuse(f"the row is longer than {MAX_ROW_BYTES >> 20} MiB", f"{name}:{start}", remedy)
            try:
                # `_decoded` handles the exceptions: the first line, and lines that are not UTF-8.
                text = line.decode() if number > 1 else _decoded(line, name, number)
            except UnicodeDecodeError:
                text = _decoded(line, name, number)
            yield text

    reader = csv.reader(lines(), strict=True)
    try:
        for cells in reader:
            place, start, num_bytes = f"{name}:{start}", reader.line_num + 1, 0
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                # If a table has no header, these are the cells of its first row.
                foreign_files.refuse_other_separator(header, place)
                names = list_names(header)
                if len(set(header)) < len(header):
                    refuse(f"the first line names a column twice ({names})", place, "give every column its own name")
            elif len(cells) != len(header):
                message = f"the row has {len(cells)} cells, and the first line names {len(header)} columns ({names})"
                refuse(message, place, 'put text that contains commas, quotes or line breaks in quotes, and write " as ""')
            else:
                yield dict(zip(header, cells, strict=True)), place, sum(map(len, cells))
    except csv.Error as error:
        if "new-line character" in str(error):
            refuse("the lines of the table end with a bare CR", name, "save it with Unix or Windows line endings")
        refuse(f"the table cannot be read: {error}", f"{name}:{reader.line_num}", 'close every quote, and write " inside as ""')


def _text_lines(lines: Iterable[tuple[int, bytes]], name: str) -> Iterator[tuple[Row, str]]:
    """Yield every non-empty line as a row with the key text."""
    for number, line in lines:
        if text := _decoded(line, name, number).rstrip("\r\n"):
            yield {"text": text}, f"{name}:{number}"


_LINES = {"jsonl": _json_lines, "txt": _text_lines}


def _decoded(line: bytes, name: str, number: int) -> str:
    """Decode a line, without the byte order mark that some programs write at the beginning of a file."""
    try:
        text = line.decode("utf-8")
        return text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        message = f"the line is not UTF-8 text (byte 0x{line[error.start]:02x})"
        refuse(message, f"{name}:{number}:{column}", _SAVE_AS_UTF8)
