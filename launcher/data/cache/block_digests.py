"""Block digests of the arrays of a data cache: written with the arrays, verified before the first use of a block.

One file per split holds the digests as little-endian uint64: for each array, its size in bytes and one digest per block. The
digest of this file is part of DataFacts.digest in the plan, so a rank refuses a cache that its run was not planned with. No
torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from launcher.errors import DataError, Problem
from launcher.shell_commands import shell_command

# Rows are read in random order. A larger block would read far more than the row. A smaller block saves no reads, because the
# kernel reads ahead by at least 128 KiB.
BLOCK_BYTES = 1 << 16
FILE = "digests.bin"
_DTYPE = np.dtype("<u8")


class DigestingWriter:
    """Wraps a file open for writing and computes the digest of each block."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digests: list[int] = []
        self._block = xxhash.xxh3_64()
        self._room = BLOCK_BYTES
        self._size = 0

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        start = 0
        while start < len(view):
            piece = view[start : start + self._room]
            if len(piece) == BLOCK_BYTES:
                self._digests.append(xxhash.xxh3_64_intdigest(piece))
            else:
                self._block.update(piece)
                self._room -= len(piece)
                if self._room == 0:
                    self._end_block()
            start += len(piece)
        self._file.write(view)
        self._size += len(view)
        return len(view)

    def digests(self) -> list[int]:
        """Return the size of the content in bytes, and the digest of each block. Nothing may be written afterwards."""
        if self._room < BLOCK_BYTES:
            self._end_block()
        return [self._size, *self._digests]

    def _end_block(self) -> None:
        self._digests.append(self._block.intdigest())
        self._block.reset()
        self._room = BLOCK_BYTES


class CheckedFile:
    """A file of the data cache `cache` whose blocks are each compared with their digest once."""

    def __init__(self, path: Path, cache: Path, num_bytes: int, digests: np.ndarray) -> None:
        """Open the file.

        Raises:
            DataError: if its size is not `num_bytes`.
        """
        self.path = path
        self._cache = cache
        self.num_bytes = num_bytes
        self._digests = digests
        # One byte per block, searchable in a fraction of a microsecond: most rows are in verified blocks.
        self._verified = bytearray(len(digests))
        self._file = path.open("rb", buffering=0)
        if (size := os.fstat(self._file.fileno()).st_size) != num_bytes:
            raise make_damage_error(cache, "a file has the wrong size", path, f"{size:,} bytes, not {num_bytes:,}")

    def verify(self, start: int = 0, stop: int | None = None) -> None:
        """Verify the blocks that hold the bytes start..stop - 1, by default all; thread-safe.

        Raises:
            DataError: if a block does not match its digest.
        """
        stop = self.num_bytes if stop is None else stop
        first, end = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        block = first
        while (block := self._verified.find(0, block, end)) >= 0:
            self._verify_block(block)
            self._verified[block] = 1

    def _verify_block(self, block: int) -> None:
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.num_bytes)
        digest, expected = xxhash.xxh3_64_intdigest(self._read(start, stop)), int(self._digests[block])
        if digest != expected:
            raise make_damage_error(
                self._cache,
                "a block does not match its digest",
                f"{self.path}, bytes {start} to {stop - 1} (block {block} of 0 to {len(self._digests) - 1})",
                f"digest {digest:016x}, not {expected:016x}",
            )

    def _read(self, start: int, stop: int) -> bytes:
        # Read instead of mapping: an I/O error raises here, but in a memory map it would kill the process.
        parts: list[bytes] = []
        try:
            while start < stop and (part := os.pread(self._file.fileno(), stop - start, start)):
                parts.append(part)
                start += len(part)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)


class CheckedArray:
    """A one-dimensional array on disk. Slices are verified before they are returned; any other index verifies the whole array."""

    def __init__(self, values: np.ndarray, file: CheckedFile) -> None:
        self._values = values
        self._file = file
        self._offset = file.num_bytes - values.nbytes

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
                self._file.verify(self._offset + start * size, self._offset + max(start, stop) * size)
                return self._values[start:stop]
        self._file.verify()
        return self._values[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype, copy=copy)

    def verify(self) -> None:
        """Verify the whole array. Raises DataError if a block is damaged."""
        self._file.verify()


def write(folder: Path, of_arrays: Iterable[list[int]]) -> str:
    """Write the digests of a split, for each array those of `DigestingWriter.digests`; return the digest of the file."""
    content = np.concatenate([np.asarray(digests, dtype=_DTYPE) for digests in of_arrays]).tobytes()
    with (folder / FILE).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return xxhash.xxh3_128_hexdigest(content)


def open_files(folder: Path, cache: Path, names: Iterable[str], digest: str) -> list[CheckedFile]:
    """Open the files `names` of the split in `folder`, in the order in which their digests were written.

    Raises:
        DataError: if the digests are not those for which `write` returned `digest`, or a file has another size.
        OSError: if a file cannot be opened.
    """
    content = (folder / FILE).read_bytes()
    if (actual := xxhash.xxh3_128_hexdigest(content)) != digest:
        message = "its block digests differ from the recorded ones, so its data may have changed"
        raise make_damage_error(cache, message, folder / FILE, f"digest {actual}, not {digest or 'recorded'}")
    table = np.frombuffer(content, _DTYPE)
    files = []
    for name in names:
        end = 1 + -(-int(table[0]) // BLOCK_BYTES)
        files.append(CheckedFile(folder / name, cache, int(table[0]), table[1:end]))
        table = table[end:]
    return files


def make_damage_error(cache: Path, message: str, where: str | Path, value: str) -> DataError:
    """Return the error for a data cache whose files have changed since they were written, with the commands to rebuild it."""
    remedy = (
        f"delete it and build it again: `{shell_command('rm', '-r', cache)}`, then `python -m launcher data ...` with the same "
        "settings (starting or resuming a run builds it as well); if it is damaged again, check the disk and this node's memory"
    )
    return DataError(Problem(f"the data cache is damaged: {message}", str(where), value, remedy))
