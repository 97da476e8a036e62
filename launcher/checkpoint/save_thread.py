"""The thread of a save: it stages, writes the shard and a receipt, and on rank 0 commits when all ranks' receipts exist.

It uses no collectives: ranks communicate through the save's directory.
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
from torch.nn import Parameter

from launcher import atomic_files
from launcher.checkpoint import safetensors_io, store, zero3
from launcher.checkpoint.manifest import REFERENCE_LOGITS, STATE, Manifest
from launcher.checkpoint.safetensors_io import TensorSpec, as_bytes
from launcher.checkpoint.shards import STORED_DTYPES, Shard, weight_digests
from launcher.checkpoint.staging import StagingBuffer, is_finite, set_current_device
from launcher.distributed import to_problems
from launcher.errors import CheckpointError, Problem
from launcher.plan.launch_plan import Record

_MAX_PAUSE_S = 1.0
_LOWEST_PRIORITY = 19


class ShardReceipt(Record):
    """Written by each rank beside its shard: size and digest of the shard, or why it could not be written."""

    entry: atomic_files.FileEntry | None = None
    problems: tuple[tuple[str, str, str, str], ...] = ()


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

    def start(self) -> None:
        """Start the save in a daemon thread."""
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    @property
    def path(self) -> Path:
        """Path of the checkpoint once it is committed."""
        return self.context.root / store.step_name(self.step)

    def _run(self) -> None:
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
                return self.shard.write(path, _pass_fault_point(_require_finite(states), self.shard.num_bytes), digests)
            self.copy.fill(states)
        self.copied.set()
        atomic_files.fault_point("copied")
        # From here on training does not wait, and takes precedence. On Linux, each thread has its own priority.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        if not self.copy.is_finite():
            raise _not_finite_error()
        return self.shard.write(path, _pass_fault_point(self.copy.blocks(), self.shard.num_bytes), digests)

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
            specs = _reference_logits_specs(self.reference_logits)
            blocks = (as_bytes(tensor.cpu().contiguous()) for tensor in self.reference_logits.values())
            files[REFERENCE_LOGITS] = safetensors_io.write(self.saving / REFERENCE_LOGITS, specs, blocks, {})
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


def _require_finite(states: Iterator[torch.Tensor]) -> Iterator[memoryview]:
    """Yield the bytes of states, directly from the engine's memory.

    Raises:
        CheckpointError: if a state is not finite.
    """
    for state in states:
        if not is_finite(state):
            raise _not_finite_error()
        yield as_bytes(state.cpu())


def _pass_fault_point(blocks: Iterator[memoryview], num_bytes: int) -> Iterator[memoryview]:
    done = 0
    for block in blocks:
        if done < num_bytes // 2 <= done + len(block):
            atomic_files.fault_point("half-written")
        done += len(block)
        yield block


def _not_finite_error() -> CheckpointError:
    return CheckpointError("weights or optimizer states are infinite or NaN; the checkpoint was not written")


def _reference_logits_specs(reference_logits: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, STORED_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in reference_logits.items()]


def reference_logits_bytes(reference_logits: Mapping[str, torch.Tensor]) -> int:
    """Return the size of the file that holds the reference logits."""
    return safetensors_io.file_bytes(_reference_logits_specs(reference_logits), {})


def _receipt_path(saving: Path, rank: int) -> Path:
    return saving / f"rank-{rank:05d}.json"
