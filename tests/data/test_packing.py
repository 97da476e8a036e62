"""Documents are packed into rows, and the rows of several sources follow their weights."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.sections.data import DataSection, Source
from launcher.data.packing import RowLayout, choose_evenly, pack, place_one_per_row
from launcher.data.row_layout import _gather as gathered
from launcher.data.row_layout import compute_budgets, draw_passes, layout_training
from launcher.data.tokenization.batch_encoder import cut_document
from launcher.data.tokenization.encoder import EncodedDocument
from launcher.errors import DataError


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
    assert [row.tolist() for row in rows(place_one_per_row(3))] == [[0], [1], [2]]


def source(name: str = "a", **settings: object) -> Source:
    return Source(name=name, path=f"{name}.jsonl", **settings)


@pytest.mark.parametrize(
    ("settings", "available", "expected"),
    [
        ([{}, {}], [100, 50], [100, 50]),
        ([{"epochs": 2.0}, {"epochs": 0.5}], [100, 50], [200, 25]),
        ([{"max_tokens": 30}, {"epochs": 3.0, "max_tokens": 120}], [100, 50], [30, 120]),
        ([{"weight": 1.0}, {"weight": 1.0}], [100, 50], [50, 50]),
        ([{"weight": 3.0}, {"weight": 1.0}], [90, 90], [90, 30]),
        ([{"weight": 0.7}, {"weight": 0.3, "epochs": 4.0}], [70, 10], [70, 30]),
        ([{"weight": 1.0, "max_tokens": 10}, {"weight": 2.0}], [100, 100], [10, 20]),
        ([{"weight": 0.0}, {"weight": 1.0}], [100, 50], [0, 50]),
        ([{}, {"weight": 1.0}, {"weight": 1.0}], [7, 100, 50], [7, 50, 50]),
        ([{}, {"weight": 0.0}], [7, 100], [7, 0]),
        ([{}], [0], [0]),
    ],
)
def test_each_source_gives_its_budget_of_tokens(settings: list[dict], available: list[int], expected: list[int]) -> None:
    assert compute_budgets([source(**one) for one in settings], available) == expected


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(DataError, match="weights of the mixture sum to zero") as caught:
        compute_budgets([source(weight=0.0), source("b", weight=0.0)], [10, 10])
    assert caught.value.problems[0].remedy


def test_a_weighted_source_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="no document to train on") as caught:
        compute_budgets([source(weight=1.0), source("empty", weight=1.0)], [10, 0])
    assert (caught.value.problems[0].where, caught.value.problems[0].value) == ("data.sources[1]", "empty")


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(0, 2000), st.integers(0, 5))
def test_passes_come_as_near_to_the_budget_as_whole_documents_do(lengths: list[int], budget: int, seed: int) -> None:
    of_doc = np.asarray(lengths, dtype=np.int64)
    drawn = draw_passes(of_doc, budget, seed)
    assert [one.tolist() for one in drawn] == [one.tolist() for one in draw_passes(of_doc, budget, seed)]
    times = np.bincount(np.concatenate([*drawn, np.empty(0, np.int64)]), minlength=len(lengths))
    assert times.max(initial=0) - times.min(initial=times.max(initial=0)) <= 1, "no document is seen twice more than another"
    assert all((np.diff(one) > 0).all() for one in drawn)
    total = int((times * of_doc).sum())
    if lengths:
        assert budget - max(lengths) < total <= budget
    else:
        assert not drawn


def test_a_part_of_a_source_represents_the_whole() -> None:
    drawn = draw_passes(np.full(10_000, 10), 25_000, seed=0)
    assert len(drawn) == 1
    assert len(drawn[0]) == 2500
    assert abs(drawn[0].mean() - 5000) < 200
    assert drawn[0].tolist() != draw_passes(np.full(10_000, 10), 25_000, seed=1)[0].tolist()


@given(st.data())
def test_rows_match_the_mixture_and_have_no_document_twice(data: st.DataObject) -> None:
    num_docs = data.draw(st.integers(1, 80))
    lengths = np.asarray(data.draw(st.lists(st.integers(1, 32), min_size=num_docs, max_size=num_docs)))
    sources = np.asarray(data.draw(st.lists(st.integers(0, 1), min_size=num_docs, max_size=num_docs)))
    kept = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=num_docs, max_size=num_docs)))
    section = DataSection(
        sources=(source("a", epochs=data.draw(st.sampled_from([1.0, 1.5, 2.5]))), source("b", epochs=3.0)),
        max_length=32,
        packing=data.draw(st.booleans()),
    )
    layout, epochs = layout_training(lengths, sources, kept, section)
    times = np.bincount(layout.order, minlength=num_docs)
    assert not times[np.setdiff1d(np.arange(num_docs), kept)].any()
    assert (times[kept[sources[kept] == 1]] == 3).all()
    for number, wanted in ((0, section.sources[0].epochs), (1, 3.0)):
        of_source = lengths[kept[sources[kept] == number]]
        total = int(of_source.sum())
        assert total == 0 or wanted - of_source.max() / total - 0.5 / total <= epochs[number] <= wanted + 0.5 / total
    for start, stop in zip(layout.starts[:-1], layout.starts[1:], strict=True):
        row = layout.order[start:stop]
        assert 0 < lengths[row].sum() <= 32
        assert len(set(row.tolist())) == len(row)
        assert section.packing or len(row) == 1


def test_many_held_out_rows_are_sampled() -> None:
    chosen = choose_evenly(100, 5)
    assert len(chosen) == 5
    assert chosen[[0, -1]].tolist() == [0, 99]
    assert choose_evenly(100, None).tolist() == choose_evenly(100, 200).tolist() == list(range(100))


def test_a_token_budget_below_every_document_is_refused() -> None:
    """With weights of nine to one, every document of the smaller source exceeds that source's token budget."""
    section = DataSection(sources=(source("many", weight=9.0), source("long", weight=1.0)), max_length=1024)
    lengths, sources = np.asarray([500] * 10 + [900] * 3), np.asarray([0] * 10 + [1] * 3)
    with pytest.raises(DataError, match="no document of the source fits into the 556 tokens") as caught:
        layout_training(lengths, sources, np.arange(13), section)
    assert (caught.value.problems[0].where, caught.value.problems[0].value) == ("data.sources[1]", "long")
    with pytest.raises(DataError, match="fits into the 100 tokens"):
        layout_training(
            lengths, np.zeros(13, int), np.arange(13), DataSection(sources=(source(max_tokens=100),), max_length=1024)
        )
