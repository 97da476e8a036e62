"""The arrays of one split of a data cache: written in parts, memory-mapped, and verified block by block on use.

No torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launcher.data.cache import block_digests
from launcher.data.cache.block_digests import CheckedArray, DigestingWriter
from launcher.errors import DataError, Problem
from launcher.plan.launch_plan import DataFacts

# These are as large as the data; the index arrays are small in comparison and read at once.
_LARGE_ARRAYS = ("tokens", "trained")
_INDEX_ARRAYS = ("rows", "docs", "row_labels", "doc_source", "row_sources")


@dataclass(frozen=True)
class Split:
    """One split of a cache, as memory maps; the docstring of `cache_store` describes the arrays."""

    tokens: np.ndarray | CheckedArray
    trained: np.ndarray | CheckedArray
    rows: np.ndarray
    docs: np.ndarray
    row_labels: np.ndarray
    doc_source: np.ndarray
    row_sources: np.ndarray

    @classmethod
    def open(cls, facts: DataFacts, held_out: bool = False) -> Split:
        """Map the training or the held-out split of the finished cache that `facts` describe.

        Each block of `tokens` and `trained` is verified before its first use. Their first blocks and all other arrays are
        verified here.

        Raises:
            DataError: if the cache cannot be read, is not the one that `facts` describe, or is damaged.
        """
        cache = Path(facts.cache_dir)
        folder = cache / "eval" if held_out else cache
        digest = facts.digest.split("-")[-1 if held_out else 0]
        names = (*_LARGE_ARRAYS, *_INDEX_ARRAYS)
        arrays: dict[str, Any] = {}
        try:
            files = block_digests.open_files(folder, cache, [f"{name}.npy" for name in names], digest)
            for name, file in zip(names, files, strict=True):
                is_large = name in _LARGE_ARRAYS
                # The first block contains the header, which numpy reads to map the file.
                file.verify(0, 1 if is_large else None)
                values = np.load(file.path, mmap_mode="r")
                arrays[name] = CheckedArray(values, file) if is_large else values
        # Other storage errors may be temporary, so the ranks are restarted for them.
        except (FileNotFoundError, ValueError) as error:
            remedy = "`python -m launcher data ...` with the same settings builds it again"
            raise DataError(Problem(f"the data cache cannot be read: {error}", str(folder), remedy=remedy)) from error
        return cls(**arrays)

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

    def doc_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of tokens of each document in `rows`, row by row."""
        first, last = (np.searchsorted(self.docs, self.rows[starts]) for starts in (rows, rows + 1))
        counts = last - first
        docs = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        return np.asarray(self.docs[docs + 1] - self.docs[docs])

    def doc_offsets(self, row: int) -> np.ndarray:
        """Return the start of each document relative to the start of `row`, and the length of the row."""
        docs = self.row_docs(row)
        return np.asarray(self.docs[docs.start : docs.stop + 1] - self.rows[row])


def write_split(folder: Path, tokens: Iterable[np.ndarray], trained: Iterable[np.ndarray], **others: np.ndarray) -> str:
    """Write the arrays of a split and their digests into `folder`; return the hex digest of the digests.

    `tokens` and `trained` are iterables of parts, because a whole split may not fit in memory.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    num_tokens = int(others["rows"][-1])
    of_arrays = [
        _write_array(folder / "tokens.npy", np.dtype(np.uint32), (num_tokens,), tokens),
        _write_array(folder / "trained.npy", np.dtype(np.uint8), (num_tokens,), trained),
        *(_write_array(folder / f"{n}.npy", others[n].dtype, others[n].shape, [others[n]]) for n in _INDEX_ARRAYS),
    ]
    return block_digests.write(folder, of_arrays)


def _write_array(path: Path, dtype: np.dtype, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> list[int]:
    """Write an array in parts; return its size in bytes and the digests of its blocks."""
    with path.open("wb") as file:
        writer = DigestingWriter(file)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(writer, header)
        for part in parts:
            writer.write(np.ascontiguousarray(part).data)
        file.flush()
        os.fsync(file.fileno())
    return writer.digests()
