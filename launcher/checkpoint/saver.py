"""Save checkpoints while training continues.

At a save, each rank copies small states (counters, random states), and training continues at once. Weights and moments change
only in the optimizer step, so a thread stages them in host memory during the following forward and backward passes;
`wait_for_staging`, called before the optimizer step, waits for the rest of the copy (Maurya et al. 2024, arXiv:2406.10707).
The thread then writes the rank's shard and a receipt beside it; rank 0's thread commits when all ranks' receipts exist.

Threads use no collectives: they communicate through the save's directory. Collectives belong to the main threads, which agree on
a save's outcome when they `wait` for it, at the latest before the next save.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from launcher.checkpoint import safetensors_io, store, zero3
from launcher.checkpoint.manifest import HELD_OUT, REFERENCE_LOGITS, STATE, Manifest
from launcher.checkpoint.safetensors_io import as_bytes
from launcher.checkpoint.shards import Shard, build_state, list_specs, require_known_dtypes, weight_digests
from launcher.distributed import run_on_all_ranks, to_problems
from launcher.errors import CheckpointError, LauncherError, Problem
from launcher.hardware import available_bytes
from launcher.plan.launch_plan import Record
from launcher.runs import atomic_files

_MAX_PAUSE_S = 1.0
_LOWEST_PRIORITY = 19
# Elements to write or check in one piece, without the GIL. Between pieces the thread needs the GIL; if it is descheduled while it
# holds the GIL, because all cores are busy, training stalls.
_BLOCK_ELEMENTS = 64 * 2**20


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: the bytes of all ranks' files, and the seconds from the call to the commit.

    `stall_s` is how long training on this rank waited; `not_pruned` says, on rank 0, why older checkpoints could not be removed.
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
        began, context, device = time.monotonic(), self._context, self._engine.device
        run_on_all_ranks(device, "the checkpoint may not be written", context.fence if self._is_main else lambda: None)

        def prepare() -> SaveJob:
            shard = Shard.of(self._engine, context.parameters, self._buffers)
            state = build_state(self._engine, context.parameters, extra_state).to_json().encode() if self._is_main else b""
            logits = {name: tensor.clone() for name, tensor in (reference_logits or {}).items()} if self._is_main else {}
            logits_bytes = safetensors_io.file_bytes(list_specs(logits), {}) if logits else 0
            saving = store.saving_path(context.root, step, context.attempt)
            copy = self._copy if not wait and self._copy is not None and self._copy.is_there() else None
            num_bytes = shard.num_bytes + len(state) + logits_bytes
            return SaveJob(context, step, saving, shard, state, logits, eval_loss, num_bytes, copy, began)

        def begin() -> None:
            if self._is_main:
                store.begin_save(context.root, step=step, attempt=context.attempt, needed_bytes=job.num_bytes)

        try:
            job = run_on_all_ranks(device, "the checkpoint could not be prepared", prepare)
            shared = torch.tensor([job.num_bytes, job.copy is not None], dtype=torch.int64, device=device)
            dist.all_reduce(shared)
            job.num_bytes, num_copies = shared.tolist()
            if num_copies < context.world_size:
                # If one rank lacks memory for staging, training waits on all ranks.
                job.copy = None
            run_on_all_ranks(device, "the checkpoint could not be started", begin)
        except CheckpointError as error:
            self._outcome = error
            return
        self._job = job
        if device.type == "cuda":
            job.after = torch.cuda.Event()
            job.after.record()
        threading.Thread(target=job.run, name="checkpoint", daemon=True).start()
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
            return job.error or job.saved
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
            self._outcome = job.saved
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


@dataclass(frozen=True)
class SaveContext:
    """The engine whose states are saved, the checkpoint root and the attempt; `prune`, `fence`, `deadline_s` as in `Saver`."""

    engine: Any
    parameters: Mapping[str, Parameter]
    root: Path
    rank: int
    world_size: int
    plan_digest: str
    attempt: int
    prune: Callable[[Path], object]
    fence: Callable[[], None]
    deadline_s: float
    eval_set: str


@dataclass
class SaveJob:
    """One save on one rank. States are written from the buffer `copy` if there is one, else from the engine's memory.

    Events: `copied`, the optimizer may change the states; `written`, this rank has written its shard or failed to; `ended`, on
    rank 0, the checkpoint is committed or has failed. `error` holds the failure.
    """

    context: SaveContext
    step: int
    saving: Path
    shard: Shard
    state: bytes
    reference_logits: Mapping[str, torch.Tensor]
    eval_loss: float | None
    num_bytes: int
    copy: StagingBuffer | None
    began: float
    after: Any = None
    stall_s: float = 0.0
    seconds: float = 0.0
    error: Exception | None = None
    not_pruned: str = ""
    copied: threading.Event = field(default_factory=threading.Event)
    written: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def saved(self) -> Saved:
        """The outcome once the checkpoint is committed."""
        path = self.context.root / store.step_name(self.step)
        return Saved(path, self.step, self.num_bytes, self.seconds, self.stall_s, self.not_pruned)

    def run(self) -> None:
        """Do this rank's part of the save, in a thread of its own."""
        set_current_device(self.context.engine.device)
        try:
            receipt = ShardReceipt(entry=self._write())
        except Exception as error:
            self.error = error
            # A partial shard may occupy the disk space that the receipt needs.
            (self.saving / store.shard_name(self.context.rank)).unlink(missing_ok=True)
            problems = to_problems("the checkpoint could not be written", error, self.context.rank)
            receipt = ShardReceipt(problems=tuple((p.message, p.where, p.value, p.remedy) for p in problems))
        self.copied.set()
        try:
            # Atomically, because rank 0 polls for it.
            atomic_files.write_text(_receipt_path(self.saving, self.context.rank), receipt.model_dump_json())
            atomic_files.fault_point("noted")
        except OSError as error:
            self.error = self.error or error
        self.written.set()
        try:
            if self.context.rank == 0:
                self._commit()
        except Exception as error:
            self.error = self.error or error
            shutil.rmtree(self.saving, ignore_errors=True)
        self.ended.set()

    def _write(self) -> atomic_files.FileEntry:
        atomic_files.fault_point("begun")
        path = self.saving / store.shard_name(self.context.rank)
        states = zero3.local_states(self.context.engine, self.context.parameters)
        with _use_side_stream(self.context.engine.device, self.after), closing(states):
            digests = weight_digests(self.context.parameters)
            if self.copy is None:
                return self.shard.write(path, self._require_finite(states), digests)
            self.copy.fill(states)
        self.copied.set()
        atomic_files.fault_point("copied")
        # From here on training does not wait, and takes precedence. On Linux, each thread has its own priority.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        return self.shard.write(path, self._require_finite(self.copy.blocks()), digests)

    def _require_finite(self, states: Iterator[torch.Tensor]) -> Iterator[memoryview]:
        """Yield the bytes of states; refuse a state that is infinite or NaN."""
        num_done, half = 0, self.shard.num_bytes // 2
        for state in states:
            # The sum is one pass without a temporary tensor; it may overflow for large finite values, hence the second check.
            if not torch.isfinite(state.sum()) and not torch.isfinite(state).all():
                raise CheckpointError("weights or optimizer states are infinite or NaN; the checkpoint was not written")
            block = as_bytes(state.cpu())
            if num_done < half <= num_done + len(block):
                atomic_files.fault_point("half-written")
            num_done += len(block)
            yield block

    def _commit(self) -> None:
        """Wait for the receipts of all ranks and rename the checkpoint into place."""
        receipts = self._await_receipts()
        problems = [Problem(*parts) for receipt in receipts for parts in receipt.problems]
        if problems:
            raise CheckpointError(dict.fromkeys(problems))
        atomic_files.fault_point("gathered")
        files = {}
        for rank, receipt in enumerate(receipts):
            assert receipt.entry is not None
            size = (self.saving / store.shard_name(rank)).stat().st_size
            if size != receipt.entry.size:
                raise CheckpointError(f"rank {rank} wrote {receipt.entry.size:,} bytes, of which {size:,} are on disk")
            files[store.shard_name(rank)] = receipt.entry
            _receipt_path(self.saving, rank).unlink()
        files[STATE] = atomic_files.write_file(self.saving / STATE, [self.state])
        if self.reference_logits:
            blocks = (as_bytes(tensor.cpu().contiguous()) for tensor in self.reference_logits.values())
            file = self.saving / REFERENCE_LOGITS
            files[REFERENCE_LOGITS] = safetensors_io.write(file, list_specs(self.reference_logits), blocks, {})
        self.context.fence()
        manifest = Manifest(
            step=self.step,
            world_size=self.context.world_size,
            plan_digest=self.context.plan_digest,
            attempt=self.context.attempt,
            eval_loss=self.eval_loss,
            eval_set=self.context.eval_set,
            files=files,
        )
        committed = store.commit(self.saving, manifest)
        self.seconds = time.monotonic() - self.began
        atomic_files.fault_point("committed")
        try:
            self.context.prune(committed)
        except (OSError, CheckpointError) as error:
            # The checkpoint stays committed.
            self.not_pruned = (
                f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error.problems[0].message)
            )

    def _await_receipts(self) -> list[ShardReceipt]:
        receipts: dict[int, ShardReceipt] = {}
        deadline, pause_s = time.monotonic() + self.context.deadline_s, 0.01
        while True:
            missing = [rank for rank in range(self.context.world_size) if rank not in receipts]
            arrived = [rank for rank in missing if _receipt_path(self.saving, rank).exists()]
            receipts |= {
                rank: ShardReceipt.model_validate_json(_receipt_path(self.saving, rank).read_bytes()) for rank in arrived
            }
            if len(receipts) == self.context.world_size:
                return [receipts[rank] for rank in range(self.context.world_size)]
            if self.abandoned.wait(pause_s) or time.monotonic() > deadline:
                raise CheckpointError(
                    "not all ranks have written their shards",
                    where=str(self.saving),
                    value=f"missing: rank {', '.join(map(str, missing))}",
                )
            atomic_files.refresh_directory(self.saving)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)


class ShardReceipt(Record):
    """Written by each rank beside its shard: size and digest of the shard, or why it could not be written."""

    entry: atomic_files.FileEntry | None = None
    problems: tuple[tuple[str, str, str, str], ...] = ()


@contextmanager
def _use_side_stream(device: torch.device, after: Any) -> Iterator[None]:
    """On a GPU, run the body in a separate stream, after the event `after`; if `after` is None, run it directly."""
    if after is None:
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        stream.wait_event(after)
        yield
    stream.synchronize()


def _receipt_path(saving: Path, rank: int) -> Path:
    return saving / f"rank-{rank:05d}.json"


def _raise_if_error(error: Exception | None) -> None:
    if error is not None:
        raise error


class StagingBuffer:
    """A buffer of `num_elements` in fp32, page-locked if the states lie on a GPU.

    A thread allocates it: locking the pages of tens of GiB takes seconds, and the first steps need not wait for that.
    """

    def __init__(self, num_elements: int, device: torch.device, sharers: int) -> None:
        """Start the allocation; `sharers` processes on this machine allocate the same amount at the same time."""
        self._is_locked = False
        self._memory: torch.Tensor | None = None
        self._used = 0
        self._ready = threading.Event()

        def allocate() -> None:
            try:
                set_current_device(device)
                if sharers * 4 * num_elements > available_bytes():
                    # The kernel would overcommit, then kill a process when the pages are touched.
                    return
                memory = torch.empty(num_elements, dtype=torch.float32)
                # The kernel maps a page on its first write: write now, not during the first save.
                memory.zero_()
                if device.type == "cuda":
                    # torch's own pinned allocations are powers of two, up to twice what the plan budgets. If the system refuses
                    # to lock that much, copies are slower.
                    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
                    self._is_locked = int(code) == 0
                self._memory = memory
            except RuntimeError:
                self._memory = None
            finally:
                self._ready.set()

        threading.Thread(target=allocate, name="host-copy", daemon=True).start()

    def is_there(self) -> bool:
        """Wait for the allocation; return False if the machine lacks the memory."""
        self._ready.wait()
        return self._memory is not None

    def fill(self, states: Iterator[torch.Tensor]) -> None:
        """Copy all of `states`; on a GPU asynchronously, in the current stream."""
        assert self._memory is not None
        self._used = 0
        for state in states:
            self._memory[self._used : self._used + state.numel()].copy_(state, non_blocking=True)
            self._used += state.numel()

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the copy in pieces."""
        assert self._memory is not None
        yield from self._memory[: self._used].split(_BLOCK_ELEMENTS)

    def close(self) -> None:
        """Free the memory."""
        self._ready.wait()
        if self._memory is not None and self._is_locked:
            # CUDA would treat later allocations at these addresses as memory that it has locked.
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory = None


def set_current_device(device: torch.device) -> None:
    """Select the thread's GPU: a thread starts on GPU 0 and would allocate memory there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
