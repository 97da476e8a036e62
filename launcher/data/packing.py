"""Best-fit-decreasing packing of documents into rows, by length alone. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """`order` lists document numbers row by row; row r holds order[starts[r]:starts[r + 1]], in ascending order."""

    order: np.ndarray
    starts: np.ndarray


def pack(lengths: np.ndarray, capacity: int) -> Packing:
    """Assign documents of `lengths` tokens to rows of at most `capacity` tokens.

    Best-fit-decreasing (Johnson 1973): the longest document first, each into the fullest row that still takes it. A row's
    only relevant property is its free space, so rows are kept in one stack per free size, and the sizes that have a row
    are the bits of one integer: shifting it by a length leaves exactly the sizes that fit, the lowest bit is the best.

    Errors: ValueError where a length is outside 1..capacity.
    """
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths must lie in 1..{capacity}, got {lengths.min()}..{lengths.max()}")
    rows_by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    free_sizes = 0
    num_rows = 0
    longest_first = np.argsort(-np.asarray(lengths), kind="stable")
    row_of = np.empty(len(lengths), dtype=np.int64)
    assigned: list[int] = []
    for length in np.asarray(lengths)[longest_first].tolist():
        fitting = free_sizes >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_sizes &= ~(1 << free)
        else:
            free, row = capacity, num_rows
            num_rows += 1
        left = free - length
        if left:
            rows_by_free[left].append(row)
            free_sizes |= 1 << left
        assigned.append(row)
    row_of[longest_first] = assigned
    starts = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=starts[1:])
    return Packing(np.argsort(row_of, kind="stable"), starts)


def one_per_row(num_docs: int) -> Packing:
    """No packing: document i is row i."""
    return Packing(np.arange(num_docs), np.arange(num_docs + 1))
