"""Packs documents into rows by their lengths. Pure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

# Number of lengths to try for the first of the last three documents of a row.
LOOK_AHEAD = 128
# Rows are made narrower than the capacity if this saves more than one part in this number.
NARROWING = 1024


@dataclass(frozen=True)
class RowLayout:
    """Documents in rows: row r consists of the documents order[starts[r]:starts[r + 1]], in ascending order."""

    order: np.ndarray
    starts: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1


def pack(lengths: np.ndarray, capacity: int) -> RowLayout:
    """Assign documents of `lengths` tokens to rows of at most `capacity` tokens.

    Best-fit-decreasing (Johnson 1973) with look-ahead: the longest document opens a row, and the longest that fits follows. If
    possible, the last one to three documents of a row are chosen to fill it exactly.

    If the smallest possible number of rows is reached, rows are only as wide as that number requires: no row is nearly empty,
    and no batch is wider than its tokens require. Raises ValueError if a length is outside 1..capacity.
    """
    lengths = np.asarray(lengths)
    if not len(lengths):
        return RowLayout(np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    if not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths must lie in 1..{capacity}, got {lengths.min()}..{lengths.max()}")
    counts = np.bincount(lengths).tolist()
    total = int(lengths.sum())
    fewest_rows = -(-total // capacity)
    narrowest, slack = max(len(counts) - 1, -(-total // fewest_rows)), capacity // NARROWING
    widths = (narrowest, narrowest + slack, capacity) if narrowest + slack < capacity else (capacity,)
    for width in dict.fromkeys(widths):
        rows_by_length, num_rows = _fill(counts, width)
        if num_rows == fewest_rows:
            break
    row_of = np.empty(len(lengths), dtype=np.int64)
    row_of[np.argsort(lengths, kind="stable")] = list(itertools.chain.from_iterable(rows_by_length))
    starts = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=starts[1:])
    return RowLayout(np.argsort(row_of, kind="stable"), starts)


def choose_evenly(num_rows: int, max_rows: int | None) -> np.ndarray:
    """Return at most `max_rows` row indices, evenly spaced. Packed rows are sorted by length, so all lengths are among them."""
    if max_rows is None or num_rows <= max_rows:
        return np.arange(num_rows)
    return np.linspace(0, num_rows - 1, max_rows).round().astype(int)


def place_one_per_row(num_docs: int) -> RowLayout:
    """Return the layout without packing: document i is row i."""
    return RowLayout(np.arange(num_docs), np.arange(num_docs + 1))


def _fill(counts: list[int], capacity: int) -> tuple[list[list[int]], int]:
    """Return (for each length the rows of its documents, number of rows) for counts[n] documents of n tokens.

    Lengths that fill a row fill as many rows as there are documents for: the work grows with the number of different lengths.
    """
    stock = _Stock(counts, capacity)
    rows_by_length: list[list[int]] = [[] for _ in counts]
    num_rows = 0
    while stock.lengths:
        row = stock.take_row()
        for n in row:
            rows_by_length[n].append(num_rows)
        num_rows += 1
        if stock.counts[row[0]] and (repeats := min(stock.counts[n] // row.count(n) for n in row)):
            for n in row:
                stock.take(n, repeats)
                rows_by_length[n] += range(num_rows, num_rows + repeats)
            num_rows += repeats
    return rows_by_length, num_rows


class _Stock:
    """Documents that are not in a row yet.

    `lengths` has bit n set if a document of n tokens is left, and `_mirrored` has bit capacity - n. For a given sum, shifting
    `_mirrored` aligns each length's bit with that of its partner.
    """

    def __init__(self, counts: list[int], capacity: int) -> None:
        self.counts = list(counts)
        self.capacity = capacity
        self.lengths = self._mirrored = 0
        for n, count in enumerate(counts):
            if count:
                self.lengths |= 1 << n
                self._mirrored |= 1 << capacity - n

    def take(self, n: int, times: int = 1) -> None:
        self.counts[n] -= times
        if not self.counts[n]:
            self.lengths ^= 1 << n
            self._mirrored ^= 1 << self.capacity - n

    def take_row(self) -> list[int]:
        """Remove the documents of one row; return their lengths."""
        row: list[int] = []
        free = self.capacity
        while fitting := self.lengths & ((2 << free) - 1):
            longest = fitting.bit_length() - 1
            chosen = self._find_exact(free, fitting) if row and free <= 3 * longest else []
            for n in chosen or [longest]:
                self.take(n)
                row.append(n)
                free -= n
        return row

    def _find_exact(self, free: int, fitting: int) -> list[int]:
        """Return one, two or three lengths with the sum `free`, longest first; empty if there are none."""
        if fitting >> free & 1:
            return [free]
        if half := self._find_pair(free):
            return [free - half, half]
        for _ in range(LOOK_AHEAD):
            longest = fitting.bit_length() - 1
            if 3 * longest < free:
                break
            if half := self._find_pair(free - longest, besides=longest):
                return [longest, free - longest - half, half]
            fitting ^= 1 << longest
        return []

    def _find_pair(self, total: int, besides: int = 0) -> int:
        """Return the shorter of two lengths with the sum `total`, as even as possible; 0 if there are none.

        One document of length `besides` is reserved. Even pairs leave the short documents to fill later rows.
        """
        half = total // 2
        pairs = self.lengths & (self._mirrored >> self.capacity - total) & ((2 << half) - 1)
        while pairs:
            shorter = pairs.bit_length() - 1
            longer = total - shorter
            if self.counts[shorter] > (shorter == longer) + (shorter == besides) and self.counts[longer] > (longer == besides):
                return shorter
            pairs ^= 1 << shorter
        return 0
