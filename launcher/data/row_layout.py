"""Rows of a split: which documents are in them, in which order, and their arrays on disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from launcher.config.data import DataSection
from launcher.data import cache, mixture, packing
from launcher.data.packing import RowLayout
from launcher.errors import DataError, Problem

_TOKENS_AT_ONCE = 1 << 22


class TokenSpool:
    """Tokens on disk in the order in which they came, until it is known where they belong."""

    def __init__(self, folder: Path) -> None:
        self._paths = (folder / "tokens.spill", folder / "trained.spill")
        self._files: list[IO[bytes]] = [path.open("wb") for path in self._paths]

    def add(self, tokens: np.ndarray, trained: np.ndarray) -> None:
        """Append the same number of `tokens` (uint32) and `trained` (uint8)."""
        for file, array in zip(self._files, (tokens, trained), strict=True):
            file.write(array.data)

    def close(self) -> tuple[np.ndarray, np.ndarray]:
        """All tokens and marks that were added, as memory maps."""
        for file in self._files:
            file.close()
        tokens, trained = self._paths
        return _mapped(tokens, np.dtype(np.uint32)), _mapped(trained, np.dtype(np.uint8))

    def remove(self) -> None:
        for path in self._paths:
            path.unlink()


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def mixed(lengths: np.ndarray, sources: np.ndarray, kept: np.ndarray, data: DataSection) -> tuple[RowLayout, list[float]]:
    """Rows of the training documents, and how often each source was passed over.

    `lengths` and `sources` are those of all documents, `kept` the numbers of those to train on. Each pass over the sources
    is packed by itself, so that a row never holds a document twice.

    Errors: DataError where a source is to give something and no document of it is short enough.
    """
    of_source = [kept[sources[kept] == i] for i in range(len(data.sources))]
    num_tokens = [int(lengths[numbers].sum()) for numbers in of_source]
    budgets = mixture.budgets(data.sources, num_tokens)
    taken = [
        [numbers[drawn] for drawn in mixture.passes(lengths[numbers], budget, seed)]
        for seed, (numbers, budget) in enumerate(zip(of_source, budgets, strict=True))
    ]
    for i, (some, budget) in enumerate(zip(taken, budgets, strict=True)):
        if budget and num_tokens[i] and not some:
            what = f"no document of a source fits into the {budget:,} tokens that the mixture takes of it"
            remedy = "raise its max_tokens, weight or epochs, or set data.long_documents=split and a lower data.max_length"
            raise DataError(Problem(what, f"data.sources[{i}]", data.sources[i].name, remedy))
    epochs = [sum(int(lengths[one].sum()) for one in some) / max(1, total) for some, total in zip(taken, num_tokens, strict=True)]
    rounds = [np.sort(np.concatenate([*some])) for some in itertools.zip_longest(*taken, fillvalue=kept[:0])]
    return _joined([_packed(lengths, numbers, data) for numbers in rounds]), epochs


def all_of(lengths: np.ndarray, kept: np.ndarray, data: DataSection, max_rows: int | None) -> RowLayout:
    """Rows of the documents `kept`, each once; of more than `max_rows` rows some are chosen that stand for all."""
    layout = _packed(lengths, kept, data)
    if max_rows is None or layout.num_rows <= max_rows:
        return layout
    # Rows stand by the length of their longest document: evenly spaced ones.
    chosen = np.linspace(0, layout.num_rows - 1, max_rows).round().astype(int)
    return _joined(
        [RowLayout(layout.order[a:b], np.asarray([0, b - a])) for a, b in layout.starts[np.stack([chosen, chosen + 1], 1)]]
    )


def _packed(lengths: np.ndarray, numbers: np.ndarray, data: DataSection) -> RowLayout:
    packed = packing.pack(lengths[numbers], data.max_length) if data.packing else packing.one_per_row(len(numbers))
    return RowLayout(numbers[packed.order], packed.starts)


def _joined(layouts: Sequence[RowLayout]) -> RowLayout:
    order = np.concatenate([np.empty(0, np.int64), *(layout.order for layout in layouts)])
    row_docs = np.concatenate([np.empty(0, np.int64), *(np.diff(layout.starts) for layout in layouts)])
    return RowLayout(order, _starts(row_docs))


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of consecutive pieces starts, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def write(
    folder: Path,
    layout: RowLayout,
    lengths: np.ndarray,
    sources: np.ndarray,
    labels: np.ndarray,
    spilled: tuple[np.ndarray, np.ndarray],
    num_sources: int,
) -> str:
    """Write the arrays of a split into `folder`; lengths, sources and labels are those of all documents, as in `spilled`.

    Returns the hex digest of the arrays.
    """
    docs = _starts(lengths[layout.order])
    row_of = np.repeat(np.arange(layout.num_rows), np.diff(layout.starts))
    doc_source = sources[layout.order].astype(np.uint16)
    cell = row_of * num_sources + doc_source
    tokens_of = np.bincount(cell, weights=np.diff(docs), minlength=layout.num_rows * num_sources)
    tokens, trained = spilled
    begins = _starts(lengths)[:-1]
    return cache.write_split(
        folder,
        _gathered(tokens, begins, lengths, layout.order),
        _gathered(trained, begins, lengths, layout.order),
        rows=docs[layout.starts],
        docs=docs,
        row_labels=np.bincount(row_of, weights=labels[layout.order], minlength=layout.num_rows).astype(np.int64),
        doc_source=doc_source,
        row_sources=tokens_of.astype(np.int32).reshape(layout.num_rows, num_sources),
    )


def _gathered(array: np.ndarray, begins: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
    """The documents of `array` in `order`, in parts of bounded size."""
    ends = np.cumsum(lengths[order])
    first = 0
    while first < len(order):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _TOKENS_AT_ONCE)))
        some = order[first:last]
        sizes = lengths[some]
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield array[np.repeat(begins[some], sizes) + offsets]
        first = last
