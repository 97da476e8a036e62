"""Lays out the rows of a split (how much of each source, which documents, in which order), and writes their arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from launcher.config.sections.data import DataSection, Source
from launcher.data import packing
from launcher.data.packing import RowLayout
from launcher.data.split import write_split
from launcher.errors import DataError
from launcher.plan.launch_plan import DataFacts

_TOKENS_AT_ONCE = 1 << 22
# Number of batches whose rows are sorted by length together: enough that each has rows of one length.
GROUPED_BATCHES = 64


class TokenSpool:
    """Tokens on disk in reading order, until the rows are laid out."""

    def __init__(self, folder: Path) -> None:
        self._paths = (folder / "tokens.spool", folder / "trained.spool")
        self._files: list[IO[bytes]] = [path.open("wb") for path in self._paths]

    def add(self, tokens: np.ndarray, trained: np.ndarray) -> None:
        """Append the same number of `tokens` (uint32) and `trained` (uint8)."""
        for file, array in zip(self._files, (tokens, trained), strict=True):
            file.write(array.data)

    def close(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all tokens and trained marks as memory maps; nothing can be added afterwards."""
        for file in self._files:
            file.close()
        tokens, trained = self._paths
        return _map(tokens, np.dtype(np.uint32)), _map(trained, np.dtype(np.uint8))

    def remove(self) -> None:
        """Delete the files."""
        for path in self._paths:
            path.unlink()


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def compute_budgets(sources: Sequence[Source], num_tokens: Sequence[int]) -> list[int]:
    """Return the number of tokens that one epoch takes of each source; `num_tokens` are those that each source has.

    A source provides `epochs` passes over its documents, and at most `max_tokens`. Sources with a weight provide less if needed,
    so that their tokens are proportional to their weights; the scarcest of them determines the scale. Raises DataError if the
    weights sum to zero, or a source with a weight has no tokens.
    """
    limits = [
        min(source.epochs * tokens, math.inf if source.max_tokens is None else source.max_tokens)
        for source, tokens in zip(sources, num_tokens, strict=True)
    ]
    weights = [source.weight for source in sources]
    if all(weight == 0 for weight in weights):
        remedy = "give at least one source a weight above 0, or leave the weights out"
        raise DataError("the weights of the mixture sum to zero", "data.sources", remedy=remedy)
    for i, (weight, limit) in enumerate(zip(weights, limits, strict=True)):
        if weight and not limit:
            message = "a source with a weight has no document to train on, so the mixture would be empty"
            raise DataError(message, f"data.sources[{i}]", sources[i].name, "add documents, or remove the source")
    scale = min((limit / weight for weight, limit in zip(weights, limits, strict=True) if weight), default=0.0)
    return [round(limit if weight is None else weight * scale) for weight, limit in zip(weights, limits, strict=True)]


def compute_shares(sources: Sequence[Source], num_tokens: Sequence[int]) -> list[float]:
    """Return the share of each source's tokens that one epoch takes, at most 1: see `compute_budgets`."""
    taken = compute_budgets(sources, num_tokens)
    return [min(1.0, budget / max(1, tokens)) for budget, tokens in zip(taken, num_tokens, strict=True)]


def draw_passes(lengths: np.ndarray, budget: int, seed: int) -> list[np.ndarray]:
    """Return the document indices, ascending, of each pass over a source: whole passes, then documents for the rest.

    Those of the last pass are drawn by `seed` only, so they represent the whole source.
    """
    total = int(lengths.sum())
    if not total:
        return []
    num_whole, rest = divmod(budget, total)
    # The raw output of PCG64 is stable across releases of numpy (NEP 19).
    drawn = np.argsort(np.random.PCG64(seed).random_raw(len(lengths)), kind="stable")
    last = np.sort(drawn[: np.searchsorted(np.cumsum(lengths[drawn]), rest, side="right")])
    return [np.arange(len(lengths))] * num_whole + [last] * (len(last) > 0)


def layout_training(
    lengths: np.ndarray, sources: np.ndarray, selected: np.ndarray, data: DataSection
) -> tuple[RowLayout, list[float]]:
    """Return the rows of the training documents, and the number of passes over each source.

    `lengths` and `sources` are for all documents, `selected` are the indices of the documents to train on. Each pass over the
    sources is packed separately, so no row holds a document twice. Raises DataError if no document of a source fits into the
    tokens that the mixture takes from it.
    """
    by_source = [selected[sources[selected] == i] for i in range(len(data.sources))]
    num_tokens = [int(lengths[indices].sum()) for indices in by_source]
    budgets = compute_budgets(data.sources, num_tokens)
    taken = [
        [indices[drawn] for drawn in draw_passes(lengths[indices], budget, seed)]
        for seed, (indices, budget) in enumerate(zip(by_source, budgets, strict=True))
    ]
    for i, (passes, budget) in enumerate(zip(taken, budgets, strict=True)):
        if budget and num_tokens[i] and not passes:
            message = f"no document of the source fits into the {budget:,} tokens that the mixture takes from it"
            remedy = "raise its max_tokens, weight or epochs, or set data.long_documents=split and a lower data.max_length"
            raise DataError(message, f"data.sources[{i}]", data.sources[i].name, remedy)
    epochs = [
        sum(int(lengths[one].sum()) for one in passes) / max(1, total) for passes, total in zip(taken, num_tokens, strict=True)
    ]
    rounds = [np.sort(np.concatenate([*passes])) for passes in itertools.zip_longest(*taken, fillvalue=selected[:0])]
    packed = [_pack(lengths, indices, data) for indices in rounds]
    order = np.concatenate([np.empty(0, np.int64), *(layout.order for layout in packed)])
    row_docs = np.concatenate([np.empty(0, np.int64), *(np.diff(layout.starts) for layout in packed)])
    return RowLayout(order, _find_starts(row_docs)), epochs


def layout_held_out(lengths: np.ndarray, selected: np.ndarray, data: DataSection) -> RowLayout:
    """Return rows that hold each of the documents `selected` once; at most data.eval_max_rows of them, evenly spaced."""
    layout = _pack(lengths, selected, data)
    rows = packing.choose_evenly(layout.num_rows, data.eval_max_rows)
    order = np.concatenate([selected[:0], *(layout.order[slice(*layout.starts[row : row + 2])] for row in rows)])
    return RowLayout(order, _find_starts(np.diff(layout.starts)[rows]))


def _pack(lengths: np.ndarray, indices: np.ndarray, data: DataSection) -> RowLayout:
    packed = packing.pack(lengths[indices], data.max_length) if data.packing else packing.place_one_per_row(len(indices))
    return RowLayout(indices[packed.order], packed.starts)


def _find_starts(lengths: np.ndarray) -> np.ndarray:
    """Return the start of each consecutive piece, and the end of the last piece."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def write(
    folder: Path,
    layout: RowLayout,
    lengths: np.ndarray,
    columns: Mapping[str, np.ndarray],
    spooled: tuple[np.ndarray, np.ndarray],
) -> str:
    """Write a split into `folder`; return its hex digest. `lengths`, `columns` and `spooled` are those of all documents."""
    docs = _find_starts(lengths[layout.order])
    tokens, trained = spooled
    begins = _find_starts(lengths)[:-1]
    return write_split(
        folder,
        _gather(tokens, begins, lengths, layout.order),
        _gather(trained, begins, lengths, layout.order),
        rows=docs[layout.starts],
        docs=docs,
        columns={name: values[layout.order] for name, values in columns.items()},
    )


def write_documents(
    folder: Path, tokens: np.ndarray, trained: np.ndarray, lengths: np.ndarray, sources: np.ndarray, data: DataSection
) -> tuple[DataFacts, np.ndarray]:
    """Write documents of a run's data in another form as a split into `folder`, to be scored.

    `tokens` and `trained` are those of all documents. Returns the split's facts, with counts of 0, and its order of the
    documents.
    """
    width = max(data.max_length, int(lengths.max(initial=1)))
    layout = packing.pack(lengths, width) if data.packing else packing.place_one_per_row(len(lengths))
    labels = np.add.reduceat(trained, _find_starts(lengths)[:-1], dtype=np.int64) if len(lengths) else np.zeros(0, np.int64)
    digest = write(folder, layout, lengths, {"source": sources, "num_trained": labels}, (tokens, trained))
    counts = {name: 0 for name, field in DataFacts.model_fields.items() if field.annotation is int}
    return DataFacts(cache_dir=str(folder), padding_frac=0, digest=f"{digest}-", **counts), layout.order


def _gather(array: np.ndarray, begins: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the documents of `array` in `order`, in parts of bounded size."""
    ends = np.cumsum(lengths[order])
    first = 0
    while first < len(order):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _TOKENS_AT_ONCE)))
        documents = order[first:last]
        sizes = lengths[documents]
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield array[np.repeat(begins[documents], sizes) + offsets]
        first = last


# The order in which training reads rows: a function of (seed, epoch) only


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
        self._permute = lru_cache(maxsize=2)(self._permute_epoch)

    def at(self, start: int, stop: int) -> np.ndarray:
        """Return the row indices at stream positions start..stop - 1; position p is in epoch p // num_rows."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_rows)
            part = self._permute(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _permute_epoch(self, epoch: int) -> np.ndarray:
        order = np.argsort(np.random.PCG64([self.seed, epoch]).random_raw(self.num_rows), kind="stable")
        if self.lengths is None:
            return order
        begin = -epoch * self.num_rows % self.batch_size
        num_batches = max(0, self.num_rows - begin) // self.batch_size
        inside = slice(begin, begin + num_batches * self.batch_size)
        rows = order[inside]
        window = np.arange(len(rows)) // (GROUPED_BATCHES * self.batch_size)
        batches = rows[np.lexsort((self.lengths[rows], window))].reshape(num_batches, self.batch_size)
        shuffled = np.argsort(np.random.PCG64([self.seed, epoch, 1]).random_raw(num_batches), kind="stable")
        return np.concatenate([order[: inside.start], batches[shuffled].ravel(), order[inside.stop :]])
