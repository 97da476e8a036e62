"""Runs the batch that needs the most memory before the first step, so a GPU runs out of memory in the first minute or not at all.

The batch runs forward and backward. Its gradients are dropped, no optimizer step follows, and random number generators are
restored, so the results of training do not change. DeepSpeed has allocated all states by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from launcher.checkpoint import zero3
from launcher.data.loader import MicroBatch, micro_batch
from launcher.data.split import Split
from launcher.distributed import rank0_broadcast
from launcher.errors import LauncherError, OutOfMemory
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import sizing_inputs
from launcher.plan.run_dir import RunDir
from launcher.plan.sizing.combinations import memory_savings
from launcher.plan.sizing.memory import DEFAULT_RUNTIME_GIB
from launcher.runs import json_records, run_store
from launcher.tracking.run_metrics import has_trained
from launcher.train.objectives import Objective

if TYPE_CHECKING:
    from launcher.train.setup import RunContext

_GIB = 2**30
# If other processes hold at least this many GiB of a GPU, they are the reason, not the run. This includes the memory that CUDA
# and NCCL use in this process, which torch does not know about.
_OF_OTHERS_GIB = 2.0


@dataclass(frozen=True)
class LargestBatchRecord:
    """The plan and the device whose largest batch fitted."""

    plan_digest: str
    device: str


def run_largest_batch(run: RunContext, engine: Any, objective: Objective, split: Split) -> None:
    """Run the micro-batch that needs the most memory, once per plan and device type. Collective.

    Raises:
        torch.OutOfMemoryError: if it does not fit.
    """
    plan, device = run.plan, run.device
    setting = plan.config.train.largest_batch_first
    if not (device.type == "cuda" if setting is None else setting):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    record, file = LargestBatchRecord(plan.digest(), name), run.run_dir.largest_batch

    def is_done() -> bool:
        return file.is_file() and json_records.read(LargestBatchRecord, file) == record

    if rank0_broadcast(run.rank_info, "the record of the largest batch cannot be read", is_done):
        return
    micro = choose_largest(split, plan.batch.micro_batch_size, plan.config.data.packing)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), zero3.dropped_gradients(engine):
        loss = objective.sum_loss(engine, micro, device, 1.0)
        engine.backward(loss, scale_wrt_gas=False)
    del loss
    peak = ""
    if device.type == "cuda":
        peak = f": {torch.cuda.max_memory_allocated(device) / _GIB:.1f} GiB at its peak"
        # The blocks that it left in the allocator may not suit the shapes that follow.
        torch.cuda.empty_cache()
    rank0_broadcast(run.rank_info, "the record of the largest batch cannot be written", lambda: json_records.write(file, record))
    labels = int((micro.labels >= 0).sum())
    run.tracker.event("info", f"the largest batch, {micro.input_ids.numel():,} tokens with {labels:,} trained, fits{peak}", 0)


def choose_largest(split: Split, micro_batch_size: int, packing: bool) -> MicroBatch:
    """Return the micro-batch of the rows with the most tokens and trained tokens; among equals, with the longest document.

    Without packing, the micro-batch of the longest rows, because rows are padded to the longest; among equals, with the most
    trained tokens.
    """
    lengths, labels = (
        np.diff(split.rows),
        np.add.reduceat(split.columns["num_trained"], np.searchsorted(split.docs, split.rows[:-1])),
    )
    if not packing:
        return micro_batch(split, np.lexsort((labels, lengths))[-micro_batch_size:], pad_id=0)
    size = lengths + labels
    # Only the largest rows are searched for the longest document: searching all rows would take minutes.
    most = np.argsort(size, kind="stable")[-64 * micro_batch_size :]
    longest = np.array([int(np.diff(split.doc_offsets(row)).max(initial=0)) for row in most])
    rows = most[np.lexsort((longest, size[most]))[-micro_batch_size:]]
    return micro_batch(split, rows, pad_id=0)


@contextmanager
def explained_out_of_memory(plan: LaunchPlan, run_dir: RunDir, has_completed_step: Callable[[], bool]) -> Iterator[None]:
    """Raise OutOfMemory if a GPU runs out of memory before any step is completed: another attempt would end the same way.

    `has_completed_step` is about this process. If the run has fitted before, or other processes use the GPU, the original
    exception is raised: the other processes may end, or another node may have none.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        others_gib = 0.0
        if torch.cuda.is_available():
            # Neither free nor in torch's allocator: other processes, CUDA and NCCL.
            free, total = torch.cuda.mem_get_info()
            others_gib = (total - free - torch.cuda.memory_reserved()) / _GIB
        is_shared = others_gib > (plan.peak.runtime_gib or DEFAULT_RUNTIME_GIB) + _OF_OTHERS_GIB
        # Unless the records say otherwise, the run has fitted before.
        has_fitted = True
        with suppress(OSError, LauncherError):
            file = run_dir.largest_batch
            is_recorded = file.is_file() and json_records.read(LargestBatchRecord, file).plan_digest == plan.digest()
            has_fitted = is_recorded or has_trained(run_dir, run_store.read_status(run_dir))
        if has_completed_step() or has_fitted or is_shared:
            raise
        peak, stage = plan.peak, plan.peak.largest
        rest_gib = peak.tensors_gib - peak.states_gib - stage.activations_gib - stage.gathered_gib
        message = (
            f"the GPU ran out of memory before the first step was completed: {str(error).split('. ')[0].strip()}. Planned were "
            f"{peak.tensors_gib:.1f} GiB of tensors: states {peak.states_gib:.1f}, activations {stage.activations_gib:.1f}, "
            f"gathered weights {stage.gathered_gib:.1f}, everything else {rest_gib:.1f}"
        )
        if torch.cuda.is_available():
            message += f"; {torch.cuda.max_memory_allocated() / _GIB:.1f} GiB were allocated"
        savings = memory_savings(sizing_inputs(plan), plan.batch.micro_batch_size, plan.checkpointing)
        raise OutOfMemory(
            message,
            where=f"{plan.gpu_name or 'GPU'}, micro-batch {plan.batch.micro_batch_size}",
            remedy=f"set one of {', '.join(savings)}" if savings else "use more GPUs, or larger ones",
        ) from error
