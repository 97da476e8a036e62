"""Reads rows from files: jsonl, json, csv, parquet and txt, plain or compressed with gzip or zstd.

A file is cut into blocks of rows, unparsed if possible, so that worker processes can parse them.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from launcher.data.sources.documents import Row, a_json_type, list_names, refuse, safe_excerpt
from launcher.errors import DataError
from launcher.runs import atomic_files

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "txt"}
COMPRESSED = (".gz", ".zst")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
# Size of a read, and of a block of rows.
_BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 256
_COPY_AGAIN = "copy or download the file again"
Item = TypeVar("Item")
OnProblem = Callable[[DataError], None]


@dataclass(frozen=True)
class DataFile:
    """A file on this machine; `name` is the name that the user knows."""

    path: Path
    name: str


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


def detect_kind(name: str) -> str | None:
    """Return one of the values of KINDS, by the file's name without its compression suffix; None for any other suffix."""
    path = Path(name.lower())
    return KINDS.get((path.with_suffix("") if path.suffix in COMPRESSED else path).suffix)


def read_blocks(path: Path, name: str) -> Iterator[Block]:
    """Yield the rows of a file, in order, in blocks of at most about a megabyte; `name` is the file's name for the user.

    Raises DataError with the place, if a file is unreadable, truncated or corrupt, or a table or array cannot be parsed.
    """
    with _open_file(path, name) as file:
        kind = _detect_file_kind(file, name)
        if kind in ("jsonl", "txt"):
            # Rows are lines, which are cut into blocks unparsed.
            for first, lines in _group((line, len(line)) for line in file):
                yield Block(kind, name, first, b"".join(lines))
        elif kind == "parquet":
            import pyarrow

            table, first = _open_table(file, name), 1
            try:
                for batch in table.iter_batches(batch_size=BLOCK_ROWS):
                    stream = pyarrow.BufferOutputStream()
                    with pyarrow.ipc.new_stream(stream, batch.schema) as writer:
                        writer.write_batch(batch)
                    yield Block(kind, name, first, stream.getvalue().to_pybytes())
                    first += batch.num_rows
            # UnicodeError: for example, column names that are not UTF-8.
            except (pyarrow.ArrowException, OSError, UnicodeError) as error:
                _refuse_corrupt(error, name, first - 1)
        else:
            rows = _parse_csv(file, name) if kind == "csv" else read_array(file, name)
            for first, group in _group(((row, place), size) for row, place, size in rows):
                yield Block(kind, name, first, tuple(group))


def raise_problem(error: DataError) -> None:
    """Raise the problem of a row: what happens to unusable rows unless they are collected or left out."""
    raise error


def parse_block(block: Block, on_problem: OnProblem = raise_problem) -> Iterator[tuple[Row, str]]:
    """Yield each row of a block with its place, file:line or file:row N; call `on_problem` for each line that is unusable.

    Raises DataError if a part of a table cannot be read, so that its rows are unknown.
    """
    if not isinstance(block.data, bytes):
        yield from block.data
    elif block.kind == "parquet":
        import pyarrow

        try:
            rows = pyarrow.ipc.open_stream(block.data).read_all().to_pylist()
        # OverflowError: for example, a time that Python cannot represent.
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            _refuse_corrupt(error, block.name, block.first - 1)
        for number, row in enumerate(rows, start=block.first):
            yield {key: _remove_nulls(value) for key, value in row.items()}, f"{block.name}:row {number}"
    else:
        for number, line in enumerate(io.BytesIO(block.data), start=block.first):
            where = f"{block.name}:{number}"
            try:
                text = _decode(line, block.name, number).rstrip("\r\n")
                row = {"text": text} if block.kind == "txt" else _parse_line(text, where)
            except DataError as error:
                on_problem(error)
            else:
                if text and row is not None:
                    yield row, where


def _parse_line(text: str, where: str) -> Row | None:
    if not text.strip():
        return None
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        remedy = "write one complete JSON object per line, as Python's json.dumps does"
        refuse(f"the line is not JSON: {error.msg}", f"{where}:{error.colno}", remedy)
    except (RecursionError, ValueError) as error:
        _refuse_value(error, where)
    if not isinstance(row, dict):
        remedy = "write one JSON object per line, or one array of objects"
        refuse(f"the line holds {a_json_type(row)}, not an object", where, remedy)
    return row


def count_file_rows(path: Path, name: str) -> int:
    """Return an upper bound of the number of rows, without parsing them. Raises DataError as `read_blocks` does."""
    with _open_file(path, name) as file:
        kind = _detect_file_kind(file, name)
        if kind == "parquet":
            return int(_open_table(file, name).metadata.num_rows)
        # Every object of a JSON array has an opening brace.
        separator = b"{" if kind == "json" else b"\n"
        count, last = 0, separator
        for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
            count, last = count + block.count(separator), block[-1:]
        # The last line may lack a line end.
        return count + (kind != "json" and last != separator)


def compute_digest(file: DataFile) -> str:
    """Return a hex digest of the file's bytes. Raises DataError."""
    try:
        return atomic_files.digest_file(file.path).xxh3_128
    except OSError as error:
        _refuse_unreadable(error, file.name)


def _group(items: Iterable[tuple[Item, int]]) -> Iterator[tuple[int, list[Item]]]:
    """Group items, given with their sizes, into blocks; yield each with the number of its first item, from 1."""
    group: list[Item] = []
    first, size = 1, 0
    for item, item_size in items:
        group.append(item)
        size += item_size
        if len(group) == BLOCK_ROWS or size >= _BLOCK_BYTES:
            yield first, group
            group, first, size = [], first + len(group), 0
    if group:
        yield first, group


def _refuse_unreadable(error: OSError, name: str) -> NoReturn:
    message = f"the data file cannot be read: {error.strerror or error}"
    refuse(message, name, "check the permissions of the file, and the disk or network that it is on")


@contextmanager
def _open_file(path: Path, name: str) -> Iterator[io.BufferedReader]:
    codec = None
    try:
        with path.open("rb", buffering=0) as raw:
            head = raw.read(4)
            raw.seek(0)
            codec = next((codec for magic, codec in _MAGIC.items() if head.startswith(magic)), None)
            if codec is None:
                yield io.BufferedReader(raw, _BLOCK_BYTES)
                return
            import pyarrow

            yield io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), codec), _BLOCK_BYTES)
    except OSError as error:
        if codec is None or error.errno is not None:
            _refuse_unreadable(error, name)
        refuse(f"the {codec} stream is truncated or corrupt: {error}", name, _COPY_AGAIN)


def _detect_file_kind(file: io.BufferedReader, name: str) -> str:
    """Return the kind of a file. For .json and .jsonl, trust the content over the name: one array, or lines of objects."""
    head = file.peek(_BLOCK_BYTES)
    if head.startswith(b"version https://git-lfs"):
        refuse("the file is a Git LFS pointer instead of the rows", name, "run in its folder: git lfs pull")
    kind = detect_kind(name)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if kind is None:
        kind = "parquet" if head.startswith(b"PAR1") else "jsonl" if text[:1] in (b"{", b"[") else None
        if kind is None:
            endings = f"{', '.join(KINDS)}, with {' or '.join(COMPRESSED)} after it if it is compressed"
            refuse("neither the name nor the content shows what kind of file this is", name, f"end its name in one of {endings}")
    if kind not in ("json", "jsonl"):
        return kind
    first, second, *_ = [*text.split(b"\n", 2), b"", b""]
    if all(re.match(rb"[^{\[]*,", line) for line in (first, second)):
        refuse("the file is not JSON, but looks like CSV", name, "rename it to end in .csv")
    if not text.startswith(b"["):
        return "jsonl"
    # If more follows a line that is an array, each line is a row.
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "json"
    return "jsonl" if text[len(first) :].strip() else "json"


def _make_object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        # It is undefined which of the values holds; most parsers silently take the last one.
        raise ValueError(f"the row has the key {safe_excerpt(key)} twice in one object")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)


def _refuse_value(error: Exception, where: str) -> NoReturn:
    """Refuse well-formed JSON that cannot be used: a key twice, nested too deeply, a number with too many digits."""
    refuse(str(error), where, "repair the row, or remove it")


def read_array(file: io.BufferedReader, name: str) -> Iterator[tuple[Row, str, int]]:
    """Yield (object, place, number of characters) of each entry of the array in `file`. Raises DataError with the place."""
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        refuse(f"the line is not UTF-8 text (byte 0x{content[error.start]:02x})", f"{name}:{line}", "save the file in UTF-8")
    separator = re.compile(r"\s*([,\]])\s*")
    number, end, where = 0, 0, name
    match = re.match(r"\s*\[\s*(\]?)\s*", text)
    try:
        while match and match[1] != "]":
            number += 1
            where = f"{name}:row {number}"
            row, end = _DECODER.raw_decode(text, match.end())
            if not isinstance(row, dict):
                refuse("an entry of the JSON array is not an object", where, "write an array of objects")
            yield row, where, end - match.end()
            match = separator.match(text, end)
        if match is None:
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        if match.end() < len(text):
            raise json.JSONDecodeError("Extra data", text, match.end())
    except json.JSONDecodeError as error:
        remedy = "write one JSON array of objects; check that the file is complete"
        refuse(f"the file is not JSON: {error.msg}", f"{name}:{error.lineno}:{error.colno}", remedy)
    except (RecursionError, ValueError) as error:
        _refuse_value(error, where)


def _parse_csv(file: io.BufferedReader, name: str) -> Iterator[tuple[Row, str, int]]:
    """Yield (row, place, number of characters) of each line after the first line, which names the columns."""
    csv.field_size_limit(sys.maxsize)
    header: list[str] | None = None
    start = 1
    reader = csv.reader((_decode(line, name, number) for number, line in enumerate(file, start=1)), strict=True)
    try:
        for cells in reader:
            place, start = f"{name}:{start}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                # If a table has no header, these are the cells of its first row.
                names = list_names(header)
                if len(set(header)) < len(header):
                    refuse(f"the first line names a column twice ({names})", place, "give every column its own name")
            elif len(cells) != len(header):
                message = f"the row has {len(cells)} cells, and the first line names {len(header)} columns ({names})"
                refuse(message, place, 'put text that contains commas, quotes or line breaks in quotes, and write " as ""')
            else:
                yield dict(zip(header, cells, strict=True)), place, sum(map(len, cells))
    except csv.Error as error:
        refuse(f"the table cannot be read: {error}", f"{name}:{reader.line_num}", 'close every quote, and write " inside as ""')


def _decode(line: bytes, name: str, number: int) -> str:
    """Decode a line, without the byte order mark that some programs write at the beginning of a file."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        message = f"the line is not UTF-8 text (byte 0x{line[error.start]:02x})"
        refuse(message, f"{name}:{number}:{column}", "save the file in UTF-8")


def _open_table(file: io.BufferedReader, name: str) -> Any:
    """Return a pyarrow ParquetFile."""
    import pyarrow
    import pyarrow.parquet

    try:
        # The footer is at the end, and a compressed stream cannot seek.
        return pyarrow.parquet.ParquetFile(file if file.seekable() else pyarrow.BufferReader(file.read()))
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        refuse(f"this is not a complete parquet file: {error}", name, _COPY_AGAIN)


def _refuse_corrupt(error: Exception, name: str, after: int) -> NoReturn:
    message = f"the parquet file is corrupt: {str(error).splitlines()[0][:200]}"
    refuse(message, f"{name}, after row {after}", _COPY_AGAIN)


def _remove_nulls(value: Any) -> Any:
    """Remove null keys of objects: in a parquet column all objects have the same keys, and missing keys are null."""
    if isinstance(value, list):
        return [_remove_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _remove_nulls(item) for key, item in value.items() if item is not None}
    return value
