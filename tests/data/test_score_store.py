"""The score store after passes that are interrupted, damaged or concurrent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launcher.data.score_store import LOG_PROBS, ScoreKey, ScoreStore
from launcher.errors import DataError

KEY = ScoreKey("w", "d", "", 2, "fp32", "sdpa", "cpu", "2", "5")
# Number of trained tokens in each of six micro-batches.
NUM_LABELS = np.asarray([3, 0, 5, 2, 4, 1])
STARTS = np.concatenate([[0], np.cumsum(NUM_LABELS)])
SCORES = -np.arange(15, dtype=np.float32)


def of(start: int, stop: int) -> list[np.ndarray]:
    return [SCORES[STARTS[number] : STARTS[number + 1]] for number in range(start, stop)]


@pytest.fixture
def store(tmp_path: Path) -> ScoreStore:
    store = ScoreStore(KEY, tmp_path)
    assert store.find_missing(NUM_LABELS) == [[0, 6]]
    return store


def test_what_is_missing_or_damaged_is_scored_again(store: ScoreStore) -> None:
    store.commit(1, 3, of(1, 3))
    store.commit(4, 5, of(4, 5))
    assert store.find_missing(NUM_LABELS) == [[0, 1], [3, 4], [5, 6]]
    shard = store.folder / "00000001-00000003.shard"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert store.find_missing(NUM_LABELS) == [[0, 4], [5, 6]]
    with pytest.raises(DataError, match="micro-batch 0 are missing"):
        store.complete(NUM_LABELS)
    assert store.read() is None


def test_overlapping_shards_of_two_passes_are_joined(store: ScoreStore) -> None:
    for start, stop in ((0, 2), (1, 4), (2, 4), (3, 6)):
        store.commit(start, stop, of(start, stop))
    store.complete(NUM_LABELS)
    scores = store.read()
    assert scores is not None
    assert scores.tolist() == SCORES.tolist()
    assert store.find_missing(NUM_LABELS) == []
    # The other pass finds the scores already complete.
    store.commit(0, 6, of(0, 6))
    store.complete(NUM_LABELS)
    assert sorted(path.name for path in store.folder.iterdir()) == ["log_probs.f32"]


def test_damaged_scores_are_not_read(store: ScoreStore) -> None:
    store.commit(0, 6, of(0, 6))
    store.complete(NUM_LABELS)
    file = store.folder / LOG_PROBS
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    assert store.read() is None
    assert store.find_missing(NUM_LABELS) == [[0, 6]]
