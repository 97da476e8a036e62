"""Heartbeats: each rank reports its progress to its node's agent through a few bytes of shared memory."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RunError
from launcher.worker.ranks.rank_env import RankEnv

# Set by the agent to `HeartbeatTable.path`; if it is not set, the rank is not watched.
VARIABLE = "LAUNCHER_HEARTBEATS"
PHASES = ("starting", "joined", "loaded", "training", "evaluating", "saving", "finishing")
_CODES = {phase: code for code, phase in enumerate(PHASES)}
# The count is at both ends, so that a reader can detect a partly written record.
_RECORD = struct.Struct("=Qqqqqd?7xQ")
_READ_TRIES = 5


@dataclass(frozen=True)
class Beat:
    """The last heartbeat of a rank.

    `count` is the number of heartbeats from process `pid`, `step` its completed optimizer steps. `at` is a time.monotonic() time;
    all processes of a machine share this clock. `trained` is whether the rank has begun to train.
    """

    count: int
    pid: int
    rank: int
    phase: str
    step: int
    at: float
    trained: bool


class HeartbeatTable:
    """The agent's side: a record per local rank in anonymous memory, which is freed when the agent ends.

    A file could block, be on a full disk, or be removed at logout (as in /dev/shm).
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._descriptor = os.memfd_create("heartbeats")
        os.ftruncate(self._descriptor, num_ranks * _RECORD.size)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def read(self) -> dict[int, Beat]:
        """Return the last heartbeat of each local rank that has sent one, whether or not its process still lives."""
        beats = ((local_rank, self._read(local_rank)) for local_rank in range(self._num_ranks))
        return {local_rank: beat for local_rank, beat in beats if beat is not None}

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self, local_rank: int) -> Beat | None:
        for _ in range(_READ_TRIES):
            record = os.pread(self._descriptor, _RECORD.size, local_rank * _RECORD.size)
            count, pid, rank, code, step, at, trained, count_again = _RECORD.unpack(record)
            if count == count_again:
                return Beat(count, pid, rank, PHASES[code], step, at, trained) if count else None
        return None


class Heartbeat:
    """A rank's side."""

    def __init__(self, table: Path | None, local_rank: int, rank: int) -> None:
        """Send heartbeats to the table at this path; None sends none.

        Raises:
            RunError: if the table cannot be opened.
        """
        self._table: mmap.mmap | None = None
        self._offset = local_rank * _RECORD.size
        self._pid, self._rank = os.getpid(), rank
        self._count, self._trained = 0, False
        if table is not None:
            try:
                with open(table, "r+b", buffering=0) as file:
                    self._table = mmap.mmap(file.fileno(), 0)
            except OSError as error:
                raise RunError(
                    f"this rank cannot send heartbeats to its node's agent: {error.strerror}",
                    where=str(table),
                    remedy="run agent and ranks in one container, or turn the watchdog off with cluster.stall_seconds=0",
                ) from None
            self.beat("starting", 0)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], env: RankEnv) -> Heartbeat:
        table = environ.get(VARIABLE)
        return cls(Path(table) if table else None, env.local_rank, env.rank)

    def beat(self, phase: str, step: int) -> None:
        """Send one of PHASES and the number of completed optimizer steps; takes about a microsecond and cannot fail."""
        if self._table is None:
            return
        self._trained |= phase == "training"
        self._count += 1
        _RECORD.pack_into(
            self._table,
            self._offset,
            self._count,
            self._pid,
            self._rank,
            _CODES[phase],
            step,
            time.monotonic(),
            self._trained,
            self._count,
        )
