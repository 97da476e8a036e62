"""The order in which training reads rows: a function of (seed, epoch) only, without torch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# Number of batches whose rows are sorted by length together: enough that each has rows of one length.
GROUPED_BATCHES = 64


class RowOrder:
    """The endless stream of row indices: epoch after epoch, each with its own permutation.

    With the rows' `lengths`, the rows of each batch of `batch_size` have similar lengths, in ascending order, and the batches are
    in random order. Rows at the start and end of an epoch, whose batch spans two epochs, are not grouped.

    Raw PCG64 output is sorted instead of calling Generator.permutation: numpy keeps raw output stable across releases (NEP 19),
    so a resumed run sees the same rows under another numpy.
    """

    def __init__(self, num_rows: int, seed: int, lengths: np.ndarray | None = None, batch_size: int = 1) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.lengths = lengths
        self.batch_size = batch_size
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def at(self, start: int, stop: int) -> np.ndarray:
        """Return the row indices at stream positions start..stop - 1; position p is in epoch p // num_rows."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_rows)
            part = self._epoch(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        order = np.argsort(np.random.PCG64([self.seed, epoch]).random_raw(self.num_rows), kind="stable")
        return order if self.lengths is None else self._grouped(order, self.lengths, epoch)

    def _grouped(self, order: np.ndarray, lengths: np.ndarray, epoch: int) -> np.ndarray:
        begin = -epoch * self.num_rows % self.batch_size
        num_batches = max(0, self.num_rows - begin) // self.batch_size
        inside = slice(begin, begin + num_batches * self.batch_size)
        rows = order[inside]
        window = np.arange(len(rows)) // (GROUPED_BATCHES * self.batch_size)
        batches = rows[np.lexsort((lengths[rows], window))].reshape(num_batches, self.batch_size)
        shuffled = np.argsort(np.random.PCG64([self.seed, epoch, 1]).random_raw(num_batches), kind="stable")
        return np.concatenate([order[: inside.start], batches[shuffled].ravel(), order[inside.stop :]])
