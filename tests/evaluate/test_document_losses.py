"""The score store after passes that are interrupted or concurrent."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from launcher.evaluate.document_losses import MAX_SHARDS, ScoreStore


def test_what_is_missing_is_scored_again(tmp_path: Path) -> None:
    store = ScoreStore("key", 2 * MAX_SHARDS - 1, tmp_path)
    assert [*map(len, store.shards)] == [2] * (MAX_SHARDS - 1) + [1]
    assert store.list_missing() == [*range(MAX_SHARDS)]
    for number in reversed(range(MAX_SHARDS)):
        assert store.list_missing() == [*range(number + 1)]
        # A micro-batch may have no trained token.
        store.commit(number, [np.full(size, -number, np.float32) for size in (2, 0)])
    # Another pass computes the same values.
    store.commit(3, [np.full(2, -3, np.float32)])
    assert ScoreStore("key", 2 * MAX_SHARDS - 1, tmp_path).read().tolist() == [
        -number for number in range(MAX_SHARDS) for _ in "ab"
    ]
    assert ScoreStore("other", 1, tmp_path).list_missing() == [0]
