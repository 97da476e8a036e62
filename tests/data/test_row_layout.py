from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.sections.data import DataSection, Source
from launcher.data.packing import choose_evenly
from launcher.data.row_layout import compute_budgets, draw_passes, layout_training
from launcher.errors import DataError


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
