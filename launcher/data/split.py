"""The arrays of one split of a data cache: written in parts, memory-mapped, and verified block by block before their first use.

One file per split holds the digests as little-endian uint64: for each array, its size in bytes and one digest per block. The
digest of this file is part of DataFacts.digest in the plan, so a rank refuses a cache that its run was not planned with. The
origin of each document is beside the arrays: in origins.npy its file (uint32, an index of origins.json), line (int64), and the
hash of its content (uint64). No torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from launcher.data import cache_store
from launcher.data.schema import COLUMNS
from launcher.errors import DataError
from launcher.plan.launch_plan import DataFacts
from launcher.runs import atomic_files
from launcher.shell_commands import shell_command

# Rows are read in random order. A larger block would read far more than the row. A smaller block saves no reads, because the
# kernel reads ahead by at least 128 KiB.
BLOCK_BYTES = 1 << 16
DIGESTS = "digests.bin"
_DTYPE = np.dtype("<u8")
# These are as large as the data; all other arrays are small in comparison and read at once.
_LARGE_ARRAYS = tuple(name for name, column in COLUMNS.items() if column.is_per_token)
# The columns of documents that are always stored.
_DOCUMENT_COLUMNS = tuple(name for name, one in COLUMNS.items() if not one.is_per_token and one.default is None)

ORIGINS = "origins.npy"
ORIGIN_FILES = "origins.json"
_ORIGIN = np.dtype([("file", "<u4"), ("line", "<i8"), ("content", "<u8")])
# The line of a document whose place does not end in a number.
_NO_LINE = -1
_PLACE = re.compile(r"(.*?)(\d{1,18})", re.DOTALL)


class CheckedArray:
    """An array in the data cache `cache`; each block is compared with its digest before its first use.

    Slices of a one-dimensional array are verified before they are returned; any other index verifies the whole array.
    """

    def __init__(self, path: Path, cache: Path, num_bytes: int, digests: np.ndarray) -> None:
        """Map the file. Raises DataError if its size is not `num_bytes`, or its header is damaged."""
        self._path, self._cache, self._num_bytes, self._digests = path, cache, num_bytes, digests
        # One byte per block, searchable in a fraction of a microsecond: most rows are in verified blocks.
        self._verified = bytearray(len(digests))
        self._file = path.open("rb", buffering=0)
        if (size := os.fstat(self._file.fileno()).st_size) != num_bytes:
            raise _make_damage_error(cache, "a file has the wrong size", path, f"{size:,} bytes, not {num_bytes:,}")
        # The first block contains the header, which numpy reads.
        self.verify(0, 1)
        self._values: np.ndarray = np.load(path, mmap_mode="r")
        self._offset = num_bytes - self._values.nbytes

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._values.dtype

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                size = self._values.itemsize
                self.verify(self._offset + start * size, self._offset + max(start, stop) * size)
                return self._values[start:stop]
        return self.load()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.load(), dtype=dtype, copy=copy)

    def load(self) -> np.ndarray:
        """Return the whole array, verified."""
        self.verify()
        return self._values

    def verify(self, start: int = 0, stop: int | None = None) -> None:
        """Verify the blocks that hold the bytes start..stop - 1, by default all; thread-safe. Raises DataError."""
        block, end = start // BLOCK_BYTES, -(-(self._num_bytes if stop is None else stop) // BLOCK_BYTES)
        while (block := self._verified.find(0, block, end)) >= 0:
            self._verify_block(block)
            self._verified[block] = 1

    def _verify_block(self, block: int) -> None:
        start, content = block * BLOCK_BYTES, b""
        try:
            # Read instead of mapping: an I/O error raises here, but in a memory map it would kill the process.
            while part := os.pread(self._file.fileno(), BLOCK_BYTES - len(content), start + len(content)):
                content += part
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        digest, expected = xxhash.xxh3_64_intdigest(content), int(self._digests[block])
        if digest != expected:
            where = f"{self._path}, bytes {start} to {start + len(content) - 1} (block {block} of 0 to {len(self._digests) - 1})"
            value = f"digest {digest:016x}, not {expected:016x}"
            raise _make_damage_error(self._cache, "a block does not match its digest", where, value)


def _make_damage_error(cache: Path, message: str, where: str | Path, value: str) -> DataError:
    """Return the error for a data cache whose files have changed since they were written, with the commands to rebuild it."""
    remedy = (
        f"delete it and build it again: `{shell_command('rm', '-r', cache)}`, then `python -m launcher data ...` with the same "
        "settings (starting or resuming a run builds it as well); if it is damaged again, check the disk and this node's memory"
    )
    return DataError(f"the data cache is damaged: {message}", str(where), value, remedy)


@dataclass(frozen=True)
class Split:
    """One split of a cache, as memory maps; the docstring of `cache_store` describes the arrays.

    `columns` are those of its documents, by name; `named` are those that micro-batches have.
    """

    tokens: np.ndarray | CheckedArray
    trained: np.ndarray | CheckedArray
    rows: np.ndarray
    docs: np.ndarray
    columns: Mapping[str, np.ndarray]
    named: tuple[str, ...] = ()

    @classmethod
    def open(cls, facts: DataFacts, held_out: bool = False, named: tuple[str, ...] = ()) -> Split:
        """Map the training or the held-out split of the finished cache that `facts` describe.

        Each block of `tokens` and `trained` is verified before its first use. Their first blocks and all other arrays are
        verified here. Columns of `named` that the cache does not store have their default. Raises DataError if the cache cannot
        be read, is not the one that `facts` describe, or is damaged.
        """
        cache = Path(facts.cache_dir)
        folder = cache / "eval" if held_out else cache
        digest = facts.digest.split("-")[-1 if held_out else 0]
        arrays: dict[str, Any] = {}
        try:
            content = (folder / DIGESTS).read_bytes()
            if (actual := xxhash.xxh3_128_hexdigest(content)) != digest:
                message = "its block digests differ from the recorded ones, so its data may have changed"
                raise _make_damage_error(cache, message, folder / DIGESTS, f"digest {actual}, not {digest or 'recorded'}")
            table = np.frombuffer(content, _DTYPE)
            for name in (*_LARGE_ARRAYS, "rows", "docs", *_DOCUMENT_COLUMNS, *facts.columns):
                end = 1 + -(-int(table[0]) // BLOCK_BYTES)
                array = CheckedArray(folder / f"{name}.npy", cache, int(table[0]), table[1:end])
                arrays[name] = array if name in _LARGE_ARRAYS else array.load()
                table = table[end:]
        # Other storage errors may be temporary, so the ranks are restarted for them.
        except (FileNotFoundError, ValueError) as error:
            remedy = "`python -m launcher data ...` with the same settings builds it again"
            raise DataError(f"the data cache cannot be read: {error}", str(folder), remedy=remedy) from error
        tokens, trained, rows, docs = (arrays.pop(name) for name in (*_LARGE_ARRAYS, "rows", "docs"))
        defaults = {name: np.full(len(docs) - 1, COLUMNS[name].default, COLUMNS[name].dtype) for name in named}
        return cls(tokens, trained, rows, docs, defaults | arrays, named)

    def verify(self) -> None:
        """Verify all blocks that are not verified yet. Raises DataError if a block is damaged."""
        for array in (self.tokens, self.trained):
            if isinstance(array, CheckedArray):
                array.verify()

    @property
    def num_rows(self) -> int:
        return len(self.rows) - 1

    @property
    def num_docs(self) -> int:
        return len(self.docs) - 1

    def row_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of tokens of each of `rows`."""
        return np.asarray(self.rows[rows + 1] - self.rows[rows])

    def row_tokens(self, row: int) -> slice:
        """Return the positions of the tokens of `row`."""
        return slice(self.rows[row], self.rows[row + 1])

    def row_docs(self, row: int) -> slice:
        """Return the indices of the documents of `row`."""
        return slice(*np.searchsorted(self.docs, self.rows[row : row + 2]).tolist())

    def docs_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the indices of the documents in `rows`, row by row."""
        first, last = (np.searchsorted(self.docs, self.rows[starts]) for starts in (rows, rows + 1))
        counts = last - first
        return np.asarray(np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts))

    def doc_offsets(self, row: int) -> np.ndarray:
        """Return the start of each document relative to the start of `row`, and the length of the row."""
        docs = self.row_docs(row)
        return np.asarray(self.docs[docs.start : docs.stop + 1] - self.rows[row])


def write_split(
    folder: Path,
    tokens: Iterable[np.ndarray],
    trained: Iterable[np.ndarray],
    rows: np.ndarray,
    docs: np.ndarray,
    columns: Mapping[str, np.ndarray],
) -> str:
    """Write the arrays of a split and their digests into `folder`; return the hex digest of the digests.

    `tokens` and `trained` are iterables of parts, because a whole split may not fit in memory. `columns` are those of documents:
    source, num_trained, and those of DataFacts.columns, in this order.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    large = zip(_LARGE_ARRAYS, (tokens, trained), strict=True)
    small = {"rows": rows, "docs": docs} | {name: values.astype(COLUMNS[name].dtype) for name, values in columns.items()}
    of_arrays = [
        *(_write_array(folder / f"{n}.npy", np.dtype(COLUMNS[n].dtype), (int(rows[-1]),), parts) for n, parts in large),
        *(_write_array(folder / f"{n}.npy", values.dtype, values.shape, [values]) for n, values in small.items()),
    ]
    content = np.concatenate([np.asarray(digests, dtype=_DTYPE) for digests in of_arrays]).tobytes()
    _write_blocks(folder / DIGESTS, [content])
    return xxhash.xxh3_128_hexdigest(content)


def _write_array(path: Path, dtype: np.dtype, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> list[int]:
    """Write an array in parts; return its size in bytes and the digests of its blocks."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return _write_blocks(path, itertools.chain([header.getvalue()], (part.tobytes() for part in parts)))


def _write_blocks(path: Path, parts: Iterable[bytes]) -> list[int]:
    """Write the consecutive parts; return their size in bytes and the digests of blocks of BLOCK_BYTES, the last one shorter."""
    digests, size, rest = [], 0, b""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            size += len(part)
            joined = memoryview(rest + part)
            end = len(joined) - len(joined) % BLOCK_BYTES
            digests += [xxhash.xxh3_64_intdigest(joined[at : at + BLOCK_BYTES]) for at in range(0, end, BLOCK_BYTES)]
            rest = bytes(joined[end:])
        if rest:
            digests.append(xxhash.xxh3_64_intdigest(rest))
        file.flush()
        os.fsync(file.fileno())
    return [size, *digests]


@dataclass(frozen=True)
class DocumentOrigins:
    """The origins of the documents of one split, in their order. `files` are the texts before the line numbers."""

    files: tuple[str, ...]
    values: np.ndarray

    @classmethod
    def open(cls, cache_dir: str, held_out: bool = False) -> DocumentOrigins:
        """Read the origins of a split. Raises DataError if a file is damaged."""
        name = f"eval/{ORIGINS}" if held_out else ORIGINS
        content = Path(cache_dir, name).read_bytes()
        if xxhash.xxh3_128_hexdigest(content) != cache_store.read_meta(cache_dir)["digests"][name]:
            where, remedy = str(Path(cache_dir, name)), "remove the cache, and build it again with: python -m launcher data"
            raise DataError("the data cache is damaged: its record of the documents' origins", where, remedy=remedy)
        return cls(tuple(json.loads(Path(cache_dir, ORIGIN_FILES).read_bytes())), np.load(io.BytesIO(content)))

    def where(self, document: int) -> str:
        """Return the file and line of a document, as the report on the data names it."""
        value = self.values[document]
        return self.files[value["file"]] + ("" if value["line"] == _NO_LINE else str(value["line"]))

    def content_id(self, document: int) -> str:
        """Return the hash of a document's text, ignoring case, white space and punctuation: 16 hex digits."""
        return f"{int(self.values[document]['content']):016x}"


def write_origins(folder: Path, documents_by_split: Sequence[np.ndarray], wheres: Sequence[str], contents: np.ndarray) -> None:
    """Write the origins of both splits; `documents_by_split` are indices of `wheres` and `contents` (uint64)."""
    numbers: dict[str, int] = {}
    entries = np.zeros(len(wheres), _ORIGIN)
    entries["content"] = contents
    for i, where in enumerate(wheres):
        match = _PLACE.fullmatch(where)
        # A number with leading zeros would not be restored exactly.
        is_line = match is not None and str(int(match[2])) == match[2]
        prefix, line = (match[1], int(match[2])) if match is not None and is_line else (where, _NO_LINE)
        entries["file"][i], entries["line"][i] = numbers.setdefault(prefix, len(numbers)), line
    for path, documents in zip((folder, folder / "eval"), documents_by_split, strict=True):
        content = io.BytesIO()
        np.save(content, entries[documents])
        atomic_files.write_bytes(path / ORIGINS, content.getvalue())
    cache_store.write_json(folder / ORIGIN_FILES, [*numbers])
