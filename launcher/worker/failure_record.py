"""The first failure of an attempt: which rank or node agent failed, how, and why.

A failing rank leaves its exception in shared memory: that needs neither disk space nor a descriptor, and cannot block.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import struct
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher import clock
from launcher.errors import (
    WOULD_REPEAT,
    CheckpointError,
    DamagedRun,
    LauncherError,
    RunError,
    Superseded,
    UnreadableRun,
    describe,
    describe_exit,
)
from launcher.plan.run_dir import RunDir
from launcher.runs import journal
from launcher.runs.journal import FailureRecord
from launcher.worker.signals import DISMISSED

# Set by the agent to `ErrorMemory.path`.
ERROR_MEMORY_VARIABLE = "LAUNCHER_ERROR_MEMORY"
# Characters of a message and of the end of a traceback, and of a cause, which may name a path; JSON needs at most six bytes for
# each, which fit into a slot.
_MAX_CHARS = 5000
_MAX_CAUSE_CHARS = 800
_SLOT_BYTES = 64 * 1024
# Process id and number of bytes that follow.
_HEADER = struct.Struct("=qq")
_TRACEBACK_LINES = 40
# Seconds that torch's elastic agent waits between TERM and KILL.
_ELASTIC_KILL_DELAY_S = 30
# What gloo, NCCL and the kernel report when the other end of a connection is gone: the consequence of another failure.
PEER_LOST = re.compile(
    r"connection (closed|reset) by peer|broken pipe|connection timed out|no route to host"
    r"|remote process exited|ncclRemoteError|unhandled system error|ncclSystemError",
    re.IGNORECASE,
)
# All ranks raise the error of the rank that failed; the problem names that rank (launcher.distributed.to_problems).
_CULPRIT = re.compile(r"^  where:  rank (\d+)\b", re.MULTILINE)
_HINTS: dict[int, str] = {
    signal.SIGSEGV: "a segmentation fault; its log ends with the stacks",
    signal.SIGBUS: "memory that is backed by a file was not there: a full disk, a full /dev/shm, or failing storage",
}
# What CUDA and the driver report for a broken GPU, and the kernel for broken shared storage. A full disk is not included.
_HARDWARE = re.compile(
    r"uncorrectable ECC|\bXid\b|fallen off the bus|GPU is lost|stale file handle|input/output error|ESTALE|\bEIO\b",
    re.IGNORECASE,
)
_EXPECTED = {kind.__name__ for kind in (*WOULD_REPEAT, CheckpointError, RunError, DamagedRun, UnreadableRun, Superseded)}


@dataclass(frozen=True)
class ErrorRecord:
    """`message` is the exception's type and text, `at` the time in seconds since the epoch.

    `cause` is the machine limit that caused the exception, empty if none is known. `step` is the number of completed optimizer
    steps, None before the rank has loaded the model.
    """

    message: str
    traceback: str = ""
    at: float | None = None
    cause: str = ""
    step: int | None = None

    @classmethod
    def of(cls, error: BaseException, cause: str = "", step: int | None = None) -> ErrorRecord:
        """Describe an exception that has just been raised."""
        trace = "".join(traceback.format_exception(error))[-_MAX_CHARS:]
        return cls(f"{type(error).__name__}: {error}"[:_MAX_CHARS], trace, clock.now(), cause[:_MAX_CAUSE_CHARS], step)


class ErrorMemory:
    """The agent's side: a slot for each local rank in anonymous memory, which is freed when the agent ends."""

    def __init__(self, num_ranks: int) -> None:
        self._descriptor = os.memfd_create("error-records")
        os.ftruncate(self._descriptor, num_ranks * _SLOT_BYTES)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def read(self, local_rank: int, pid: int) -> ErrorRecord | None:
        """Return the record that the process `pid` left, or None if it left none."""
        slot = os.pread(self._descriptor, _SLOT_BYTES, local_rank * _SLOT_BYTES)
        owner, num_bytes = _HEADER.unpack_from(slot)
        return ErrorRecord(**json.loads(slot[_HEADER.size : _HEADER.size + num_bytes])) if owner == pid else None

    def close(self) -> None:
        os.close(self._descriptor)


class ErrorSlot:
    """A rank's side, mapped when it starts."""

    def __init__(self, memory: mmap.mmap | None, local_rank: int) -> None:
        self._memory, self._offset = memory, local_rank * _SLOT_BYTES

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> ErrorSlot:
        """Map the slot that the agent provides; without one, `write` does nothing."""
        memory, local_rank = None, int(environ.get("LOCAL_RANK", "0"))
        # In a container with its own PID namespace the agent's path does not exist; the record is then lost.
        with suppress(OSError, ValueError), open(environ.get(ERROR_MEMORY_VARIABLE, ""), "r+b", buffering=0) as file:
            memory = mmap.mmap(file.fileno(), 0)
        return cls(memory, local_rank)

    def write(self, record: ErrorRecord) -> None:
        """Leave a record for the agent; the header, which makes it valid, comes last."""
        if self._memory is None:
            return
        content = json.dumps(asdict(record)).encode()
        begin = self._offset + _HEADER.size
        self._memory[begin : begin + len(content)] = content
        _HEADER.pack_into(self._memory, self._offset, os.getpid(), len(content))


@dataclass(frozen=True)
class RankExit:
    """How a failed rank ended. `at` is in seconds since the epoch, `error` is the record that the rank left, if any."""

    rank: int
    exit_code: int
    at: float
    error: ErrorRecord | None

    @property
    def is_killed(self) -> bool:
        """True if a signal other than the agent's own TERM ended the rank; with a record, its exception ended it."""
        return self.exit_code < 0 and -self.exit_code not in (signal.SIGTERM, signal.SIGINT) and self.error is None

    @property
    def description(self) -> str:
        """Describe the end from the exit code alone."""
        ended = describe_exit(self.exit_code).removeprefix("was ")
        if self.exit_code >= 0:
            return f"{ended} and left no record of an error"
        hint = _HINTS.get(-self.exit_code)
        return f"{ended} ({hint})" if hint else ended

    @property
    def is_consequence(self) -> bool:
        """True if the rank only lost its connection to another rank, or reports another rank's error."""
        return self.error is not None and bool(PEER_LOST.search(self.error.message) or self.culprit != self.rank)

    @property
    def culprit(self) -> int:
        """The rank that failed according to the error record; it may be another rank."""
        match = _CULPRIT.search(self.error.message) if self.error is not None else None
        return int(match[1]) if match else self.rank


def from_rank_exits(
    exits: Sequence[RankExit], run: RunDir, attempt: int, stalls: Sequence[str] = (), limit: str = ""
) -> FailureRecord:
    """Return the first failure among the exits of a node's ranks.

    A rank that was killed by a signal precedes ranks that lost their connection to it. `stalls` are the watchdog's messages about
    ranks that it killed; `limit` is the limit that the kernel enforced meanwhile (launcher.clusters.limits).
    """
    earliest = min(end.at for end in exits)

    def order(end: RankExit) -> tuple[bool, bool, bool, float, int]:
        # After the first failure the agent itself sends TERM to the other ranks, and kills them 30 s later.
        killed = end.is_killed and end.at - earliest < _ELASTIC_KILL_DELAY_S / 2
        return end.exit_code == DISMISSED, not killed, end.is_consequence, end.at, end.rank

    return from_exit(min(exits, key=order), run, attempt, stalls, limit)


def is_of_machines(failure: FailureRecord) -> bool:
    """Return whether a signal, broken hardware, a lost peer or a node's agent caused a failure, not the training itself."""
    by_signal = failure.rank is None or failure.kind == "killed"
    return by_signal or is_consequence(failure) or _HARDWARE.search(failure.message) is not None


def is_consequence(failure: FailureRecord) -> bool:
    """Return whether a failure reports no more than a lost connection to another process."""
    return PEER_LOST.search(failure.message) is not None


def exception_of(failure: FailureRecord) -> str:
    """Return the name of the Python exception behind a failure of the training itself; empty for other failures."""
    return "" if is_of_machines(failure) or failure.kind == "exit" else failure.kind


def first_of(failures: Iterable[FailureRecord]) -> FailureRecord | None:
    """Return the node failure that caused the other nodes' failures, or None if there are no failures."""

    def order(failure: FailureRecord) -> tuple[bool, bool, bool, float]:
        # A rank's own record precedes what agents report about each other. Node clocks differ, so times come last.
        return failure.rank is None, failure.kind != "killed", is_consequence(failure), failure.at or 0.0

    return min(failures, key=order, default=None)


def from_exit(end: RankExit, run: RunDir, attempt: int, stalls: Sequence[str] = (), limit: str = "") -> FailureRecord:
    """Return the failure of one rank; if a limit of the machine caused it, the message names the limit first."""
    kind, message, trace = "killed" if end.is_killed else "exit", end.description, ""
    if end.error is not None:
        message, trace = end.error.message, end.error.traceback
        kind, _, text = message.partition(": ")
        if kind in _EXPECTED:
            # The message is sufficient; the rank's log has the traceback.
            message, trace = text, ""
        limit = end.error.cause or (limit if not PEER_LOST.search(message) and kind not in _EXPECTED else "")
    elif end.exit_code == -signal.SIGKILL and stalls:
        message, limit = stalls[-1].removeprefix(f"rank {end.rank} "), ""
    return FailureRecord(
        rank=end.culprit,
        kind=kind,
        message=f"{limit}: {message}" if limit else message,
        at=end.at,
        exit_code=end.exit_code,
        traceback="\n".join(trace.splitlines()[-_TRACEBACK_LINES:]),
        log=str(run.rank_log(attempt, end.culprit)),
        step=None if end.error is None else end.error.step,
    )


def from_exception(error: Exception, log: Path, limit: str) -> FailureRecord:
    """Return the failure of a node's agent, which no rank caused; `log` is the file with the agent's output."""
    message = f"{limit}: {describe(error)}" if limit else describe(error)
    return FailureRecord(None, type(error).__name__, message, log=str(log))


def read_final(run: RunDir, attempt: int) -> FailureRecord | None:
    """Return the recorded failure that a restart would repeat, or None if there is none or it cannot be read."""
    with suppress(LauncherError):
        return journal.read_repeatable_failure(run, attempt)
    return None
