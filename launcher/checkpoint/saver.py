"""Save checkpoints while training continues.

At a save, each rank copies small states (counters, random states), and training continues at once. Weights and moments change
only in the optimizer step, so a thread stages them in host memory during the following forward and backward passes;
`wait_for_staging`, called before the optimizer step, waits for the rest of the copy (Maurya et al. 2024, arXiv:2406.10707).
The thread then writes the rank's shard and a receipt beside it; rank 0's thread commits when all ranks' receipts exist.

Threads use no collectives: those belong to the main threads, which agree on a save's outcome when they `wait` for it, at the
latest before the next save.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from launcher.checkpoint import store, zero3
from launcher.checkpoint.manifest import HELD_OUT
from launcher.checkpoint.save_thread import SaveContext, SaveJob, reference_logits_bytes
from launcher.checkpoint.shards import Shard, build_state, require_known_dtypes
from launcher.checkpoint.staging import StagingBuffer
from launcher.distributed import run_on_all_ranks, to_problems
from launcher.errors import CheckpointError, LauncherError


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint.

    `bytes` counts the files of all ranks, `seconds` lasts from the call to the commit, `stall_s` is how long training on this
    rank waited. `not_pruned` says, on rank 0, why older checkpoints could not be removed.
    """

    path: Path
    step: int
    bytes: int
    seconds: float
    stall_s: float
    not_pruned: str = ""


class Saver:
    """Saves one engine's checkpoints under `root`, one at a time.

    `named_parameters` names each parameter of the engine's model once, as in the Hugging Face model, and `named_buffers` the
    buffers that belong in weight files. `prune` is called on rank 0 with the path of each checkpoint after its commit. With
    `background`, this rank's states are staged in host memory at a save; without it, or if a machine lacks that memory, or if
    states lie on NVMe, training waits for the write. `fence` is called on rank 0 before anything is written and before the
    commit, and raises if this process must not write any more. The save fails if a rank has written no receipt within
    `deadline_s` seconds. `eval_set` is the set of the losses that are passed to `save`.
    """

    def __init__(
        self,
        engine: Any,
        named_parameters: Mapping[str, Parameter],
        root: Path,
        *,
        plan_digest: str,
        attempt: int,
        prune: Callable[[Path], object],
        background: bool,
        deadline_s: float,
        fence: Callable[[], None] = lambda: None,
        eval_set: str = HELD_OUT,
        named_buffers: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        zero3.require_supported_engine(engine, named_parameters)
        require_known_dtypes(named_buffers or {})
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._context = SaveContext(
            engine, named_parameters, root, rank, world_size, plan_digest, attempt, prune, fence, deadline_s, eval_set
        )
        self._engine, self._is_main, self._buffers = engine, rank == 0, named_buffers or {}
        self._copy: StagingBuffer | None = None
        if background and zero3.can_stage_in_background(engine):
            num_tensors = 1 + len(zero3.find_optimizer(engine).states)
            num_elements = sum(map(zero3.local_elements, named_parameters.values())) * num_tensors
            self._copy = StagingBuffer(num_elements, engine.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._job: SaveJob | None = None
        self._outcome: Saved | CheckpointError | None = None

    def save(
        self,
        step: int,
        extra_state: Mapping[str, Any],
        *,
        eval_loss: float | None = None,
        reference_logits: Mapping[str, torch.Tensor] | None = None,
        wait: bool = False,
    ) -> None:
        """Start to save the engine's current state, at an optimizer boundary; `wait` returns the outcome. Collective.

        `extra_state` is JSON-serializable. `reference_logits` holds `input_ids` [1, T], `position_ids` [1, T] and `logits`
        [1, T, V] in the model's compute dtype; only rank 0's are written. With `wait`, the save has ended when this returns.

        Raises:
            CheckpointError: on every rank, if this attempt must not write any more.
        """
        self.wait()
        began = time.monotonic()
        fence = self._context.fence if self._is_main else lambda: None
        run_on_all_ranks(self._engine.device, "the checkpoint may not be written", fence)
        try:
            self._job = self._begin_job(step, extra_state, eval_loss, reference_logits or {}, wait, began)
        except CheckpointError as error:
            self._outcome = error
            return
        job = self._job
        if self._engine.device.type == "cuda":
            job.after = torch.cuda.Event()
            job.after.record()
        job.start()
        job.stall_s = time.monotonic() - began
        if job.copy is None:
            self.wait()

    @property
    def is_saving(self) -> bool:
        """Whether a save was started and not waited for; the same on every rank."""
        return self._job is not None

    def wait_for_staging(self) -> None:
        """Wait until the optimizer may change the states; call it before each optimizer step."""
        if self._job is not None and not self._job.copied.is_set():
            began = time.monotonic()
            self._job.copied.wait()
            self._job.stall_s += time.monotonic() - began

    def poll(self) -> Saved | LauncherError | None:
        """Return the outcome of the background save on rank 0 as soon as it has ended; None before that and on other ranks."""
        job = self._job
        if job is None or not self._is_main or not job.ended.is_set():
            return None
        if job.error is None or isinstance(job.error, LauncherError):
            return job.error or _describe_saved(job)
        return CheckpointError(to_problems("the checkpoint failed", job.error, 0))

    def wait(self) -> Saved | CheckpointError | None:
        """Wait for the last save and return its outcome, the same on every rank; None if there was none. Collective."""
        job = self._job
        if job is None:
            return self._outcome
        began = time.monotonic()
        job.written.wait()
        try:
            run_on_all_ranks(self._engine.device, "the checkpoint could not be written", lambda: _raise_if_error(job.error))
            if self._is_main:
                job.ended.wait()
            run_on_all_ranks(self._engine.device, "the checkpoint could not be committed", lambda: _raise_if_error(job.error))
            # Only rank 0's thread knows the time of the commit; this rank may have called wait() much later.
            seconds = torch.tensor(job.seconds, dtype=torch.float32, device=self._engine.device)
            dist.broadcast(seconds, 0)
            job.seconds = float(seconds)
            job.stall_s += time.monotonic() - began
            self._outcome = _describe_saved(job)
        except CheckpointError as error:
            job.abandoned.set()
            if self._is_main:
                job.ended.wait()
            self._outcome = error
        self._job = None
        return self._outcome

    def close(self) -> None:
        """Free the staging buffer; no save may be in progress, and none can be started after this."""
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def drain(self, seconds: float) -> None:
        """Wait up to `seconds` for the background save, in a process that is about to exit."""
        if self._job is not None:
            (self._job.ended if self._is_main else self._job.written).wait(seconds)

    def _begin_job(
        self,
        step: int,
        extra_state: Mapping[str, Any],
        eval_loss: float | None,
        reference_logits: Mapping[str, torch.Tensor],
        wait: bool,
        began: float,
    ) -> SaveJob:
        """Agree on the size and create the directory of the save."""
        root, parameters = self._context.root, self._context.parameters

        def prepare() -> SaveJob:
            shard = Shard.of(self._engine, parameters, self._buffers)
            state = build_state(self._engine, parameters, extra_state).to_json().encode() if self._is_main else b""
            logits = {name: tensor.clone() for name, tensor in reference_logits.items()} if self._is_main else {}
            num_bytes = shard.num_bytes + len(state) + (reference_logits_bytes(logits) if logits else 0)
            saving = store.saving_path(root, step, self._context.attempt)
            copy = self._copy if not wait and self._copy is not None and self._copy.is_there() else None
            return SaveJob(self._context, step, saving, shard, state, logits, eval_loss, num_bytes, copy, began)

        job = run_on_all_ranks(self._engine.device, "the checkpoint could not be prepared", prepare)
        shared = torch.tensor([job.num_bytes, job.copy is not None], dtype=torch.int64, device=self._engine.device)
        dist.all_reduce(shared)
        job.num_bytes, num_copies = shared.tolist()
        if num_copies < self._context.world_size:
            # If one rank lacks memory for staging, training waits on all ranks.
            job.copy = None

        def begin() -> None:
            if self._is_main:
                store.begin_save(root, step=step, attempt=self._context.attempt, needed_bytes=job.num_bytes)

        run_on_all_ranks(self._engine.device, "the checkpoint could not be started", begin)
        return job


def _describe_saved(job: SaveJob) -> Saved:
    return Saved(job.path, job.step, job.num_bytes, job.seconds, job.stall_s, job.not_pruned)


def _raise_if_error(error: Exception | None) -> None:
    if error is not None:
        raise error
