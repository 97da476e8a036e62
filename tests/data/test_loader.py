from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.config.data import DataSection
from launcher.data.build import build
from launcher.data.cache import Split
from launcher.data.loader import IGNORED, MicroBatch, RowOrder, TrainBatches, eval_batches
from launcher.errors import DataError
from launcher.plan.launch_plan import Batch

PAD = 2
GLOBAL = 8
ORDER_OF_SEED_42 = [4, 1, 3, 6, 0, 7, 2, 5, 1, 2, 5, 3, 6, 0, 4, 7]


@pytest.fixture
def split(section: Callable[..., DataSection], tokenizer_dir: Path) -> Split:
    return Split.open(build(section(), str(tokenizer_dir)).cache_dir)


def batch(world_size: int, micro: int = 2) -> Batch:
    return Batch(
        global_batch_size=GLOBAL,
        micro_batch_size=micro,
        accumulation=GLOBAL // (micro * world_size),
        max_tokens_per_step=0,
        tokens_per_step=None,
        max_steps=1,
        epochs=None,
    )


def expected_row(split: Split, row: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, positions and labels of one row, token by token."""
    tokens, positions, labels = [], [], []
    starts = set(split.docs.tolist())
    for t in range(split.rows[row], split.rows[row + 1]):
        tokens.append(int(split.tokens[t]))
        positions.append(0 if t in starts else positions[-1] + 1)
        predicts = t + 1 not in starts and split.trained[t + 1]
        labels.append(int(split.tokens[t + 1]) if predicts else IGNORED)
    return tokens, positions, labels


def assert_matches(micro: MicroBatch, split: Split) -> None:
    width = max(int(split.rows[row + 1] - split.rows[row]) for row in micro.row_ids)
    assert micro.input_ids.shape == micro.position_ids.shape == micro.labels.shape == (len(micro.row_ids), width)
    assert {micro.input_ids.dtype, micro.position_ids.dtype, micro.labels.dtype} == {torch.int64}
    for i, row in enumerate(micro.row_ids):
        tokens, positions, labels = expected_row(split, row)
        padding = width - len(tokens)
        assert micro.input_ids[i].tolist() == tokens + [PAD] * padding
        assert micro.position_ids[i].tolist() == positions + list(range(padding))
        assert micro.labels[i].tolist() == labels + [IGNORED] * padding
    assert micro.num_tokens == sum(micro.doc_lengths) == sum(len(expected_row(split, row)[0]) for row in micro.row_ids)
    assert len(micro.doc_lengths) == sum(expected_row(split, row)[1].count(0) for row in micro.row_ids)


def test_rows_become_batches_token_by_token(split: Split) -> None:
    batches = TrainBatches(split, batch(world_size=1), seed=0, rank=0, world_size=1, pad_id=PAD)
    micros = [micro for step in range(3) for micro in batches.step(step).micro]
    assert len(micros) == 12
    for micro in micros:
        assert_matches(micro, split)
    assert any((micro.position_ids[:, 1:] == 0).any() for micro in micros), "some row holds several documents"
    assert any(len(set(split.row_lengths(np.asarray(micro.row_ids)).tolist())) > 1 for micro in micros), "some row is padded"


def test_rows_and_counts_are_the_same_for_every_world_size(split: Split) -> None:
    steps = 2 * split.num_rows // GLOBAL + 2
    stream = RowOrder(split.num_rows, seed=7).at(0, steps * GLOBAL).tolist()
    for world_size in (1, 2, 4):
        ranks = [TrainBatches(split, batch(world_size), 7, rank, world_size, PAD) for rank in range(world_size)]
        for step in range(steps):
            parts = [rank.step(step) for rank in ranks]
            dealt = [row for m in range(len(parts[0].micro)) for part in parts for row in part.micro[m].row_ids]
            assert dealt == stream[step * GLOBAL : (step + 1) * GLOBAL]
            for part in parts:
                assert list(part.row_ids) == dealt
                assert part.num_labels == sum(int((m.labels != IGNORED).sum()) for other in parts for m in other.micro)
                assert part.num_tokens == sum(m.num_tokens for other in parts for m in other.micro)


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    order = RowOrder(13, seed=3)
    epochs = [order.at(e * 13, (e + 1) * 13).tolist() for e in range(4)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    stream = [row for epoch in epochs for row in epoch]
    assert order.at(5, 40).tolist() == stream[5:40]
    assert RowOrder(13, seed=3).at(30, 39).tolist() == stream[30:39], "reaching a step needs none before it"
    assert RowOrder(13, seed=4).at(0, 13).tolist() != epochs[0]


def test_the_order_never_changes_between_releases() -> None:
    assert RowOrder(8, seed=42).at(0, 16).tolist() == ORDER_OF_SEED_42


def test_a_batch_larger_than_the_data_takes_several_epochs(split: Split) -> None:
    size = 5 * split.num_rows
    wide = Batch(
        global_batch_size=size, micro_batch_size=5, accumulation=split.num_rows,
        max_tokens_per_step=0, tokens_per_step=None, max_steps=1, epochs=None,
    )  # fmt: skip
    step = TrainBatches(split, wide, 0, 0, 1, PAD).step(1)
    assert np.bincount(step.row_ids).tolist() == [5] * split.num_rows


def test_a_batch_that_does_not_split_is_refused(split: Split) -> None:
    with pytest.raises(DataError, match="not the global batch"):
        TrainBatches(split, batch(world_size=2), 0, 0, 4, PAD)


@pytest.mark.parametrize("world_size", [1, 2, 3, 64])
def test_evaluation_sees_every_row_once_and_keeps_the_ranks_in_step(split: Split, world_size: int) -> None:
    ranks = [eval_batches(split, 2, rank, world_size, PAD) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    micros = [micro for batches in ranks for micro in batches]
    assert sorted(row for micro in micros for row in micro.row_ids) == list(range(split.num_rows))
    for micro in micros:
        if micro.row_ids:
            assert_matches(micro, split)
        else:
            assert micro.input_ids.tolist() == [[PAD]]
            assert micro.labels.tolist() == [[IGNORED]]
            assert (micro.num_tokens, micro.doc_lengths) == (0, ())
    assert sum(int((micro.labels != IGNORED).sum()) for micro in micros) == int(split.row_labels.sum())


def test_an_empty_held_out_split_has_no_batches(section: Callable[..., DataSection], tokenizer_dir: Path) -> None:
    held_out = Split.open(build(section(), str(tokenizer_dir)).cache_dir, held_out=True)
    assert held_out.num_rows == 0
    assert eval_batches(held_out, 2, 0, 2, PAD) == []
