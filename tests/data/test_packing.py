from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.data.packing import RowLayout, one_per_row, pack
from launcher.data.row_layout import _gather as gathered
from launcher.data.tokenization.batch_encoder import cut_document
from launcher.data.tokenization.encoder import EncodedDocument


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> int:
    """Return the number of rows that textbook best-fit-decreasing needs."""
    free: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - length)
        else:
            free.append(capacity - length)
    return len(free)


def rows(packing: RowLayout) -> list[np.ndarray]:
    return [packing.order[a:b] for a, b in itertools.pairwise(packing.starts)]


def assert_sound(packing: RowLayout, lengths: np.ndarray, capacity: int) -> None:
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    assert packing.starts[0] == 0
    assert packing.starts[-1] == len(lengths)
    for row in rows(packing):
        assert 0 < lengths[row].sum() <= capacity
        assert (np.diff(row) > 0).all()


@given(st.data())
def test_every_document_once_and_no_row_over_its_length(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 300))
    lengths = np.asarray(data.draw(st.lists(st.integers(1, capacity), max_size=200)), dtype=np.int64)
    packing = pack(lengths, capacity)
    assert_sound(packing, lengths, capacity)
    # Best-fit-decreasing needs at most 11/9 of the optimal number of rows plus 6/9 (Dosa 2007).
    assert packing.num_rows <= 11 / 9 * best_fit_decreasing(lengths, capacity) + 2 / 3


@given(st.data())
def test_every_token_once_and_in_order_where_long_documents_are_split(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(16, 64))
    lengths = data.draw(st.lists(st.integers(1, 4 * capacity), min_size=1, max_size=20))
    ends = np.cumsum(lengths)
    documents = [np.arange(end - length, end, dtype=np.uint32) for length, end in zip(lengths, ends, strict=True)]
    masks = [np.asarray(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=np.uint8) for n in lengths]
    pieces = []
    for ids, mask in zip(documents, masks, strict=True):
        mask[0] = 0
        cut = cut_document(EncodedDocument(ids, mask, ()), capacity, "split")
        trained = {int(token) for piece in cut for token in piece.ids[piece.trained == 1]}
        # The first token of a piece has no context to be predicted from.
        assert trained == {int(token) for i, token in enumerate(ids) if mask[i] and i % capacity}
        left_out = set(ids.tolist()) - {token for piece in cut for token in piece.ids.tolist()}
        assert not any(mask[token - ids[0]] and (token - ids[0]) % capacity for token in left_out)
        pieces += cut
    sizes = np.asarray([len(piece.ids) for piece in pieces])
    packed = pack(sizes, capacity)
    assert_sound(packed, sizes, capacity)
    spilled = np.concatenate([piece.ids for piece in pieces])
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    written = np.concatenate([*gathered(spilled, begins, sizes, packed.order)])
    assert sorted(written.tolist()) == sorted(spilled.tolist())
    assert len(set(written.tolist())) == len(written)
    borders = np.cumsum(sizes[packed.order])[:-1]
    for number, piece in zip(packed.order, np.split(written, borders), strict=True):
        assert piece.tolist() == pieces[number].ids.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_filled_better_than_by_best_fit_decreasing(seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity = int(random.integers(1, 600))
    lengths = np.clip(random.lognormal(np.log(capacity / 4 + 1), 1, int(random.integers(1, 400))), 1, capacity).astype(np.int64)
    packing = pack(lengths, capacity)
    assert_sound(packing, lengths, capacity)
    assert -(-lengths.sum() // capacity) <= packing.num_rows <= best_fit_decreasing(lengths, capacity)


def test_rows_are_narrowed_to_equal_widths() -> None:
    lengths = np.random.default_rng(1).integers(20, 200, 300)
    capacity = 2048
    packing = pack(lengths, capacity)
    filled = [int(lengths[row].sum()) for row in rows(packing)]
    assert len(filled) == -(-lengths.sum() // capacity)
    assert max(filled) < capacity
    assert 1 - lengths.sum() / (len(filled) * max(filled)) < 0.002


def test_a_million_documents_take_seconds() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1, 1_000_000), 1, 2048).astype(np.int64)
    began = time.process_time()
    packing = pack(lengths, 2048)
    assert time.process_time() - began < 3
    assert 1 - lengths.sum() / (packing.num_rows * 2048) < 1e-4


def test_packing_depends_only_on_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    first, second = pack(lengths, 128), pack(lengths.copy(), 128)
    assert first.order.tolist() == second.order.tolist()
    assert first.starts.tolist() == second.starts.tolist()


def test_no_documents_make_no_rows() -> None:
    assert rows(pack(np.empty(0, dtype=np.int64), 8)) == []


@pytest.mark.parametrize("length", [0, 9])
def test_a_document_longer_than_a_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.8"):
        pack(np.asarray([3, length]), 8)


def test_without_packing_each_document_is_a_row() -> None:
    assert [row.tolist() for row in rows(one_per_row(3))] == [[0], [1], [2]]
