from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.sections.data import DataSection
from launcher.data.build import build
from launcher.data.loader import IGNORED, MicroBatch, PrefetchLoader, RowBatches, StepBatch, TrainBatches
from launcher.data.row_layout import RowOrder
from launcher.data.split import Split
from launcher.errors import DataError
from launcher.plan.launch_plan import Batch

PAD = 2
GLOBAL = 8
ORDER_OF_SEED_42 = [4, 1, 3, 6, 0, 7, 2, 5, 1, 2, 5, 3, 6, 0, 4, 7]


@pytest.fixture
def split(section: Callable[..., DataSection], tokenizer_dir: Path) -> Split:
    return Split.open(build(section(), str(tokenizer_dir)))


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
    """Return the tokens, positions and labels of one row, computed token by token."""
    tokens, positions, labels = [], [], []
    starts = set(split.docs.tolist())
    for t in range(split.rows[row], split.rows[row + 1]):
        tokens.append(int(split.tokens[t]))
        positions.append(0 if t in starts else positions[-1] + 1)
        predicts = t + 1 not in starts and split.trained[t + 1]
        labels.append(int(split.tokens[t + 1]) if predicts else IGNORED)
    return tokens, positions, labels


def documents(split: Split, row: int) -> list[int]:
    """Return the length of each document in a row."""
    positions = expected_row(split, row)[1]
    starts = [i for i, position in enumerate(positions) if position == 0]
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]


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


def test_rows_become_batches_token_by_token(split: Split) -> None:
    batches = TrainBatches(split, batch(world_size=1), seed=0, data_rank=0, data_ranks=1, pad_id=PAD)
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
                assert part.num_tokens == sum(len(expected_row(split, row)[0]) for row in part.row_ids)
                assert part.num_slots == sum(m.input_ids.numel() for other in parts for m in other.micro)
                assert part.doc_lengths == tuple(n for row in part.row_ids for n in documents(split, row))


class Untouched:
    """Tokens that must not be read."""

    def __getitem__(self, place: object) -> np.ndarray:
        raise AssertionError(f"tokens are read: {place}")

    __array__ = __len__ = __getitem__


def test_lengths_and_order_are_known_without_the_tokens(split: Split) -> None:
    blind = replace(split, tokens=Untouched(), trained=Untouched())
    for grouped in (False, True):
        wanted, batches = (
            TrainBatches(one, batch(1), seed=5, data_rank=0, data_ranks=1, pad_id=PAD, group_by_length=grouped)
            for one in (split, blind)
        )
        stop = 2 * split.num_rows
        rows = batches.order.at(0, stop)
        assert rows.tolist() == wanted.order.at(0, stop).tolist()
        assert blind.row_lengths(rows).tolist() == split.row_lengths(rows).tolist()
        assert [blind.doc_offsets(row).tolist() for row in rows] == [split.doc_offsets(row).tolist() for row in rows]
        with pytest.raises(AssertionError, match="tokens are read"):
            batches.step(0)


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    order = RowOrder(13, seed=3)
    epochs = [order.at(e * 13, (e + 1) * 13).tolist() for e in range(4)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    stream = [row for epoch in epochs for row in epoch]
    assert order.at(5, 40).tolist() == stream[5:40]
    assert RowOrder(13, seed=3).at(30, 39).tolist() == stream[30:39], "reaching a step needs none before it"
    assert RowOrder(13, seed=4).at(0, 13).tolist() != epochs[0]


@given(
    num_rows=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    epochs=st.integers(1, 4),
    lengths=st.randoms(use_true_random=False),
)
def test_grouped_rows_are_each_seen_once_per_epoch(num_rows: int, batch_size: int, epochs: int, lengths: Random) -> None:
    of_row = np.asarray([lengths.randint(1, 500) for _ in range(num_rows)])
    order = RowOrder(num_rows, 3, of_row, batch_size)
    stream = order.at(0, epochs * num_rows)
    for epoch in stream.reshape(epochs, num_rows):
        assert sorted(epoch.tolist()) == list(range(num_rows))
    # Within an epoch, each batch is sorted by length, and any step can be computed on its own.
    for batch in range(epochs * num_rows // batch_size):
        start, stop = batch * batch_size, (batch + 1) * batch_size
        rows = RowOrder(num_rows, 3, of_row, batch_size).at(start, stop)
        assert rows.tolist() == stream[start:stop].tolist()
        if start // num_rows == (stop - 1) // num_rows:
            assert (np.diff(of_row[rows]) >= 0).all()


def test_grouping_leaves_little_padding_and_keeps_batches_in_random_order() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int) + 1

    def padding(order: RowOrder) -> float:
        widths = lengths[order.at(0, 20_000)].reshape(-1, 8)
        return 1 - widths.sum() / (8 * widths.max(axis=1)).sum()

    plain, grouped = RowOrder(20_000, 1), RowOrder(20_000, 1, lengths, batch_size=32)
    assert padding(grouped) < 0.05 < 0.4 < padding(plain)
    first_of_batch = lengths[grouped.at(0, 20_000)][::32]
    assert abs(np.corrcoef(first_of_batch[:-1], first_of_batch[1:])[0, 1]) < 0.15
    assert grouped.at(0, 20_000).tolist() != grouped.at(20_000, 40_000).tolist()


def test_grouped_batches_are_the_same_for_every_world_size(section: Callable[..., DataSection], tokenizer_dir: Path) -> None:
    single = Split.open(build(section(packing=False), str(tokenizer_dir)))
    seen = []
    for world_size in (1, 2, 4):
        ranks = [
            TrainBatches(single, batch(world_size), 7, rank, world_size, PAD, group_by_length=True) for rank in range(world_size)
        ]
        steps = [[rank.step(step) for rank in ranks] for step in range(40)]
        assert all(part.row_ids == step[0].row_ids for step in steps for part in step)
        dealt = [row for step in steps for m in range(len(step[0].micro)) for part in step for row in part.micro[m].row_ids]
        assert dealt == [row for step in steps for row in step[0].row_ids]
        seen.append(dealt)
    assert seen[0] == seen[1] == seen[2]


def test_the_next_batch_is_prefetched(split: Split) -> None:
    made: list[tuple[int, str]] = []
    went_ahead = threading.Event()

    class Watched(TrainBatches):
        def step(self, step: int) -> StepBatch:
            made.append((step, threading.current_thread().name))
            if step == 6:
                went_ahead.set()
            return super().step(step)

    inputs = (split, batch(world_size=1), 0, 0, 1, PAD)
    ahead, plain = PrefetchLoader(Watched(*inputs), torch.device("cpu")), TrainBatches(*inputs)
    for step in (5, 6, 2):
        got, expected = ahead.step(step), plain.step(step)
        assert (got.row_ids, got.num_labels) == (expected.row_ids, expected.num_labels)
        for a, b in zip(got.micro, expected.micro, strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.labels, b.labels)
        if step == 5:
            assert went_ahead.wait(timeout=20), "step 6 is made though nobody has asked for it"
    assert ahead.split is split
    assert [step for step, _ in made][:4] == [5, 6, 7, 2], "what is ready is not made again"
    assert threading.current_thread().name not in {name for _, name in made}


def test_an_error_while_prefetching_is_raised_when_the_batch_is_requested(split: Split) -> None:
    class Broken(TrainBatches):
        def step(self, step: int) -> StepBatch:
            if step == 1:
                raise DataError("the disk is gone")
            return super().step(step)

    ahead = PrefetchLoader(Broken(split, batch(world_size=1), 0, 0, 1, PAD), torch.device("cpu"))
    ahead.step(0)
    with pytest.raises(DataError, match="the disk is gone"):
        ahead.step(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_are_in_page_locked_memory(split: Split) -> None:
    ahead = PrefetchLoader(TrainBatches(split, batch(world_size=1), 0, 0, 1, PAD), torch.device("cuda:0"))
    assert all(micro.input_ids.is_pinned() and micro.labels.is_pinned() for micro in ahead.step(0).micro)


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


def test_row_batches_have_every_row_once_and_padding_after_the_last(split: Split) -> None:
    batches = RowBatches(split, 2, PAD)
    micros = [batches.load(number) for number in range(len(batches))]
    assert [row for micro in micros for row in micro.row_ids] == list(range(split.num_rows))
    for micro in micros:
        assert_matches(micro, split)
    padding = batches.load(len(batches))
    assert (padding.row_ids, padding.input_ids.tolist(), padding.labels.tolist()) == ((), [[PAD]], [[IGNORED]])
    assert not len(batches.label_sources(len(batches)))


def test_row_batches_of_chosen_rows_name_the_source_of_each_trained_token(split: Split) -> None:
    rows = np.asarray([4, 1, 3])
    batches = RowBatches(split, 2, PAD, rows)
    assert [batches.load(number).row_ids for number in range(2)] == [(4, 1), (3,)]
    for number in range(2):
        expected = []
        for row in batches.rows_of(number):
            for doc in range(split.num_docs):
                if split.rows[row] <= split.docs[doc] < split.rows[row + 1]:
                    trained = int(np.asarray(split.trained[split.docs[doc] : split.docs[doc + 1]]).sum())
                    expected += [int(split.columns["source"][doc])] * trained
        assert batches.label_sources(number).tolist() == expected


def test_an_empty_held_out_split_has_no_batches(section: Callable[..., DataSection], tokenizer_dir: Path) -> None:
    held_out = Split.open(build(section(), str(tokenizer_dir)), held_out=True)
    assert held_out.num_rows == 0
    assert len(RowBatches(held_out, 2, PAD)) == 0
