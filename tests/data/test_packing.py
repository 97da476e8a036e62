from __future__ import annotations

import itertools

import numpy as np
import pytest

from launcher.data.packing import Packing, one_per_row, pack


def first_fit(lengths: np.ndarray, capacity: int) -> int:
    """Rows that first-fit needs, in the given order."""
    free: list[int] = []
    for length in lengths.tolist():
        row = next((i for i, space in enumerate(free) if space >= length), None)
        if row is None:
            free.append(capacity - length)
        else:
            free[row] -= length
    return len(free)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> int:
    """Rows that best-fit-decreasing needs, written down as in the textbook."""
    free: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - length)
        else:
            free.append(capacity - length)
    return len(free)


def rows(packing: Packing) -> list[np.ndarray]:
    return [packing.order[a:b] for a, b in itertools.pairwise(packing.starts)]


@pytest.mark.parametrize("seed", range(20))
def test_every_document_once_within_capacity_and_well_filled(seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity = int(random.integers(1, 600))
    lengths = np.clip(random.lognormal(np.log(capacity / 4 + 1), 1, int(random.integers(1, 400))), 1, capacity).astype(np.int64)
    packing = pack(lengths, capacity)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    for row in rows(packing):
        assert 0 < lengths[row].sum() <= capacity
        assert (np.diff(row) > 0).all()
    assert len(packing.starts) - 1 == best_fit_decreasing(lengths, capacity) <= first_fit(lengths, capacity)


def test_the_length_alone_decides() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    first, second = pack(lengths, 128), pack(lengths.copy(), 128)
    assert first.order.tolist() == second.order.tolist()
    assert first.starts.tolist() == second.starts.tolist()


def test_no_documents_make_no_rows() -> None:
    assert rows(pack(np.empty(0, dtype=np.int64), 8)) == []


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_that_fits_no_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.8"):
        pack(np.asarray([3, length]), 8)


def test_without_packing_each_document_is_a_row() -> None:
    assert [row.tolist() for row in rows(one_per_row(3))] == [[0], [1], [2]]
