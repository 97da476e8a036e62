"""Batches of packed rows, in an order that depends only on (seed, epoch); any step is equally cheap to reach."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from launcher.data.row_layout import RowOrder
from launcher.data.split import Split
from launcher.errors import DataError
from launcher.plan.launch_plan import Batch

IGNORED = -100
"""Label of an untrained token; the default `ignore_index` of torch's cross entropy."""


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass on one rank: B rows, padded to the longest of T tokens. Tensors are int64 [B, T], on CPU.

    `position_ids` restart at 0 at each document and at the padding. `labels` are already shifted: labels[b, t] is token t + 1 if
    that token is trained and in the same document, else IGNORED. `columns` are those that the objective names: at each token
    the value of its document, 0 at the padding. A batch without rows is one row of padding, with empty `row_ids`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    row_ids: tuple[int, ...]
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """Cumulative lengths of documents and padding in the concatenated rows, from 0 to B * T: int32 [n + 1], on CPU."""
        return find_boundaries(self.position_ids)

    def pin_memory(self) -> MicroBatch:
        """Return a copy in page-locked memory, which can be copied to a GPU asynchronously."""
        names = ("input_ids", "position_ids", "labels")
        pinned = {name: getattr(self, name).pin_memory() for name in names}
        return replace(self, **pinned, columns={name: values.pin_memory() for name, values in self.columns.items()})


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: this rank's micro-batches, and the documents of the global batch over all ranks.

    `num_tokens` excludes padding, `num_slots` includes it. `documents` has the columns of the documents, and `doc_lengths` their
    tokens, row by row. `row_ids` are in the order of the global batch.
    """

    micro: list[MicroBatch]
    num_tokens: int
    num_slots: int
    documents: Mapping[str, np.ndarray]
    doc_lengths: tuple[int, ...]
    row_ids: tuple[int, ...]

    @property
    def num_labels(self) -> int:
        """The number of trained labels."""
        return int(self.documents["num_trained"].sum())


class TrainBatches:
    """Random access to the steps of a run for one data rank.

    Global batch b consists of stream positions b * G to (b + 1) * G. Row j of micro-batch m on data rank r is index (m *
    data_ranks + r) * micro_batch_size + j within it, so the batch is the same for every number of ranks. With `group_by_length`,
    for rows that are not packed, the rows of one batch have similar lengths. Raises DataError if the split is empty, or `batch`
    does not divide over `data_ranks`.
    """

    def __init__(
        self,
        split: Split,
        batch: Batch,
        seed: int,
        data_rank: int,
        data_ranks: int,
        pad_id: int,
        group_by_length: bool = False,
    ) -> None:
        if split.num_rows == 0:
            raise DataError("the training split has no rows", "data.sources", remedy="add rows to train on")
        if batch.micro_batch_size * batch.accumulation * data_ranks != batch.global_batch_size:
            product = f"{batch.micro_batch_size} rows x {batch.accumulation} micro-batches x {data_ranks} ranks"
            message, remedy = f"{product} is not the global batch", "plan the run for this world size"
            raise DataError(message, "train.global_batch_size", str(batch.global_batch_size), remedy)
        self.split = split
        self.batch = batch
        self.data_rank = data_rank
        self.data_ranks = data_ranks
        self.pad_id = pad_id
        lengths = np.diff(split.rows) if group_by_length else None
        self.order = RowOrder(split.num_rows, seed, lengths, batch.global_batch_size)

    def step(self, step: int) -> StepBatch:
        """Return the batch of optimizer step `step`, counted from 0."""
        size, micro_size = self.batch.global_batch_size, self.batch.micro_batch_size
        rows = self.order.at(step * size, (step + 1) * size)
        lengths, docs = self.split.row_lengths(rows), self.split.docs_of(rows)
        mine = rows.reshape(self.batch.accumulation, self.data_ranks, micro_size)[:, self.data_rank]
        return StepBatch(
            micro=[micro_batch(self.split, micro, self.pad_id) for micro in mine],
            num_tokens=int(lengths.sum()),
            # Each micro-batch is padded to its longest row.
            num_slots=int(lengths.reshape(-1, micro_size).max(axis=1).sum()) * micro_size,
            documents={name: values[docs] for name, values in self.split.columns.items()},
            doc_lengths=tuple((self.split.docs[docs + 1] - self.split.docs[docs]).tolist()),
            row_ids=tuple(rows.tolist()),
        )


class PrefetchLoader:
    """Prepares the batch of the next step in a thread while the current step is computed.

    For a GPU, batches are in page-locked memory. Any step may be requested; only the step after the last request is prefetched.
    """

    def __init__(self, batches: TrainBatches, device: torch.device) -> None:
        self.split = batches.split
        self._batches = batches
        self._pin_memory = device.type == "cuda"
        # A thread starts with the first GPU as its device, where page-locking would allocate memory.
        on_device = partial(torch.cuda.set_device, device) if self._pin_memory else None
        self._thread = ThreadPoolExecutor(1, "batches", initializer=on_device)
        self._ready: dict[int, Future[tuple[StepBatch, float]]] = {}
        self.load_s = math.nan
        """Seconds that the preparation of the last returned batch took."""

    def step(self, step: int) -> StepBatch:
        """Return the batch of optimizer step `step`, counted from 0."""
        future = self._ready.get(step) or self._thread.submit(self._load, step)
        batch, self.load_s = future.result()
        self._ready = {step + 1: self._thread.submit(self._load, step + 1)}
        return batch

    def _load(self, step: int) -> tuple[StepBatch, float]:
        began = time.perf_counter()
        batch = self._batches.step(step)
        if self._pin_memory:
            batch = replace(batch, micro=[micro.pin_memory() for micro in batch.micro])
        return batch, time.perf_counter() - began


class RowBatches:
    """Rows of a split in micro-batches that are the same for every number of ranks. No row is in two micro-batches.

    `rows` are row indices, by default all. Micro-batches are loaded on demand.
    """

    def __init__(self, split: Split, micro_batch_size: int, pad_id: int, rows: np.ndarray | None = None) -> None:
        self.split, self.micro_batch_size, self._pad_id = split, micro_batch_size, pad_id
        self.rows = np.arange(split.num_rows) if rows is None else rows

    def __len__(self) -> int:
        return -(-len(self.rows) // self.micro_batch_size)

    def load(self, number: int) -> MicroBatch:
        """Return micro-batch `number`; after the last, one row of padding, because a forward pass under ZeRO-3 is collective."""
        return micro_batch(self.split, self.rows_of(number), self._pad_id)

    def rows_of(self, number: int) -> np.ndarray:
        """Return the rows of micro-batch `number`; the last one may have fewer, and later ones have none."""
        return self.rows[number * self.micro_batch_size : (number + 1) * self.micro_batch_size]

    def label_sources(self, number: int) -> np.ndarray:
        """Return the index of the source of each trained token of micro-batch `number`, in order, int64 [num_labels]."""
        docs = self.split.docs_of(self.rows_of(number))
        return np.repeat(self.split.columns["source"][docs].astype(np.int64), self.split.columns["num_trained"][docs])


def find_boundaries(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the cumulative lengths of documents, int32 [n + 1], from 0 to B * T. Each document restarts its positions at 0."""
    starts = (position_ids.reshape(-1) == 0).nonzero().squeeze(1)
    return torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)


def micro_batch(split: Split, rows: np.ndarray, pad_id: int) -> MicroBatch:
    """Return the rows of `split` with the indices `rows`, padded to the longest row."""
    lengths = split.row_lengths(rows)
    shape = (max(1, len(rows)), int(lengths.max(initial=1)))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.tile(np.arange(shape[1]), (shape[0], 1))
    columns = {name: np.zeros(shape, split.columns[name].dtype) for name in split.named}
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens = split.row_tokens(row)
        input_ids[i, :length] = split.tokens[tokens]
        # A document's first token is never trained, so no label crosses into the next document.
        labels[i, : length - 1] = np.where(split.trained[tokens][1:], input_ids[i, 1:length], IGNORED)
        offsets = split.doc_offsets(row)
        position_ids[i] -= np.repeat([*offsets], np.diff([*offsets, shape[1]]))
        for name, values in columns.items():
            values[i, :length] = np.repeat(split.columns[name][split.row_docs(row)], np.diff(offsets))
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        labels=torch.from_numpy(labels),
        row_ids=tuple(rows.tolist()),
        columns={name: torch.from_numpy(values) for name, values in columns.items()},
    )
