"""Reads tables from parquet files, whose few bytes can expand to any number of rows of any size.

A value in a dictionary counts once in a file and in its metadata, but is copied to each row that refers to it. So decoding is
limited: one batch by the memory that it takes, all batches by the size of the file, as for compressed text.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any, NoReturn

from launcher.data.sources.row_values import HARMLESS_BYTES, MAX_EXPANSION, MAX_ROW_BYTES, Row, refuse

# Limits of the blocks of rows that are parsed together.
_BLOCK_BYTES, _BLOCK_ROWS = 1 << 20, 256
_WITHOUT_COMPRESSION = "if you trust the file, write it without compression or dictionaries"


def count_rows(file: io.BufferedReader, name: str) -> int:
    """Return the number of rows according to the file's metadata. Raises DataError if it is not a table."""
    return int(_open(file, name)[0].metadata.num_rows)


def read_parts(file: io.BufferedReader, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield the rows of a file in parts of about a megabyte: the number of the first row, and an Arrow stream.

    Raises:
        DataError: if a file is corrupt or expands too much.
    """
    import pyarrow

    table, num_file_bytes = _open(file, name)
    first, num_bytes = 1, 0
    try:
        for batch in _batches(table):
            num_bytes += batch.nbytes
            _require_in_proportion(num_bytes, num_file_bytes, name)
            num_rows = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES * batch.num_rows // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, num_rows):
                part = batch.slice(start, num_rows)
                if part.num_rows == 1 and part.nbytes > MAX_ROW_BYTES:
                    remedy = "split the document into several rows"
                    refuse(f"the row is longer than {MAX_ROW_BYTES >> 20} MiB", f"{name}:row {first}", remedy)
                stream = pyarrow.BufferOutputStream()
                with pyarrow.ipc.new_stream(stream, part.schema) as writer:
                    writer.write_batch(part)
                yield first, stream.getvalue().to_pybytes()
                first += part.num_rows
    # UnicodeError: for example, column names that are not UTF-8.
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        _corrupt(error, name, first - 1)


def parse_part(data: bytes, name: str, first: int) -> Iterator[tuple[Row, str]]:
    """Yield each row of a part with its place, file:row N. Raises DataError with the place."""
    import pyarrow

    try:
        rows = pyarrow.ipc.open_stream(data).read_all().to_pylist()
    # OverflowError: for example, a time that Python cannot represent.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        _corrupt(error, name, first - 1)
    for number, row in enumerate(rows, start=first):
        yield {key: _without_nulls(value) for key, value in row.items()}, f"{name}:row {number}"


def _open(file: io.BufferedReader, name: str) -> tuple[Any, int]:
    """Return a pyarrow ParquetFile, and the size of the file in bytes."""
    import pyarrow
    import pyarrow.parquet

    # The footer is at the end, and a compressed stream cannot seek.
    seekable = file if file.seekable() else pyarrow.BufferReader(file.read())
    try:
        table = pyarrow.parquet.ParquetFile(seekable)
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        refuse(f"this is not a complete parquet file: {error}", name, "copy or download the file again")
    num_file_bytes = seekable.seek(0, os.SEEK_END)
    groups = (table.metadata.row_group(i) for i in range(table.metadata.num_row_groups))
    _require_in_proportion(sum(group.total_byte_size for group in groups), num_file_bytes, name)
    return table, num_file_bytes


def _require_in_proportion(num_bytes: int, num_file_bytes: int, name: str) -> None:
    if num_bytes > max(HARMLESS_BYTES, MAX_EXPANSION * num_file_bytes):
        refuse(f"the table expands to more than {MAX_EXPANSION} times the size of its file", name, _WITHOUT_COMPRESSION)


def _batches(table: Any) -> Iterator[Any]:
    """Yield the rows of a table in batches of some MiB, with plain values."""
    import pyarrow

    for batch in table.iter_batches(batch_size=_batch_size(table)):
        plain = pyarrow.schema([field.with_type(_plain(field.type)) for field in batch.schema])
        yield batch if plain.equals(batch.schema) else batch.cast(plain)


def _plain(kind: Any) -> Any:
    """Return an Arrow type whose rows hold their own values: dictionaries and views refer to values that rows share."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_string_view(kind):
        return pyarrow.string()
    if types.is_binary_view(kind):
        return pyarrow.binary()
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_map(kind):
        return pyarrow.map_(_plain(kind.key_type), _plain(kind.item_type))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_plain(field.type)) for field in kind])
    return kind


def _batch_size(table: Any) -> int:
    """Return how many rows to decode at a time: some MiB of them, by the mean row size of the largest row group."""
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
    return max(1, min(4 * _BLOCK_ROWS, 4 * _BLOCK_BYTES // max(1, row_bytes)))


def _corrupt(error: Exception, name: str, after: int) -> NoReturn:
    message = f"the parquet file is corrupt: {str(error).splitlines()[0][:200]}"
    refuse(message, f"{name}, after row {after}", "copy or download the file again")


def _without_nulls(value: Any) -> Any:
    """Remove null keys of objects: in a parquet column all objects have the same keys, and missing keys are null."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
