"""Which worker of a group hangs: each tells how far its rank is, and all are compared, on whatever nodes they are."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace

import psutil

from launcher.worker.heartbeat import Beat, HeartbeatTable
from launcher.worker.ray.messages import RankSign
from launcher.worker.watchdog import Limits, stalled

# Workers ask several times a second. Whoever says nothing for so long is cut off, or its machine hangs; where a rank counts as
# stalled sooner, its worker does so too.
SILENT_S = 60.0
# What a worker told of its rank is evidence for so long, and for this share of the limit where that is less.
_FRESH_S, _FRESH_SHARE = 10.0, 0.2
# From the wish for a rank's stacks to its end.
_DUMP_S = 2.0


class Observer:
    """A worker's side: the last sign of life of its rank, whose silence counts only while it was looked at all the time."""

    def __init__(self, table: HeartbeatTable, local_rank: int, stall_s: float) -> None:
        self._table, self._local_rank, self._gap_s = table, local_rank, stall_s / 2
        self._looked = self._since = time.monotonic()

    def sign(self, pid: int) -> RankSign | None:
        """Return the last heartbeat of the process `pid`; None where it has sent none or has ended."""
        now = time.monotonic()
        if now - self._looked > self._gap_s:
            # This process was stopped, and its rank perhaps with it.
            self._since = now
        self._looked = now
        beat = self._table.read().get(self._local_rank)
        if beat is None or beat.pid != pid:
            return None
        try:
            state = psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            return None
        return RankSign(beat, max(0.0, now - max(beat.at, self._since)), state)


class Liveness:
    """The coordinator's side: when each worker was heard last, by its rank in the group, and what it told of its own rank."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._silent_s = min(limits.stall_s or SILENT_S, SILENT_S)
        self._gap_s = self._silent_s / 2
        self._heard: dict[int, float] = {}
        self._beats: dict[int, Beat] = {}
        self._states: dict[int, str] = {}
        self._stuck: dict[int, float] = {}
        self._asked: set[int] = set()
        self._called = self._since = time.monotonic()

    def hear(self, rank: int, sign: RankSign | None = None) -> None:
        now = time.monotonic()
        if now - self._called > self._gap_s:
            # It was the coordinator that did not listen, as while storage held it up.
            self._since = now
        self._called = self._heard[rank] = now
        if sign is not None:
            self._beats[rank] = replace(sign.beat, at=now - sign.silent_s)
            self._states[rank] = sign.process_state

    def silent(self, ranks: Collection[int]) -> dict[int, float]:
        """Those of `ranks` that have said nothing for too long, with the seconds; one that never said anything counts as well."""
        now = time.monotonic()
        seconds = {rank: now - max(self._heard.get(rank, self._since), self._since) for rank in ranks}
        return {rank: silence for rank, silence in seconds.items() if silence > self._silent_s}

    def are_still(self, ranks: Collection[int]) -> bool:
        """True where all of `ranks` have trained and none has gone on within its limit: they wait for another one, or hang.

        Loading has deadlines of its own, and finishing takes the time that it takes.
        """
        if self._limits.stall_s <= 0:
            return False
        now, beats = time.monotonic(), [self._beats.get(rank) for rank in ranks]
        return all(b is not None and b.trained and now - max(b.at, self._since) > self._limits.of(b) for b in beats)

    def phases(self, ranks: Collection[int]) -> set[str]:
        """What `ranks` were doing when they were heard last."""
        return {self._beats[rank].phase for rank in ranks if rank in self._beats}

    def hung(self, ranks: Collection[int]) -> dict[int, tuple[Beat, float, str]]:
        """Those of `ranks` that are to be killed: the last beat, seconds without one, and why.

        Nobody is judged while one of the workers says nothing: its own rank may be the culprit, or have gone on.
        """
        now, fresh_s = time.monotonic(), min(_FRESH_S, _FRESH_SHARE * self._limits.stall_s)
        if self._limits.stall_s <= 0 or any(now - self._heard.get(rank, self._since) > fresh_s for rank in ranks):
            return {}
        beats = {rank: self._beats[rank] for rank in ranks if rank in self._beats}
        verdict = stalled(beats, self._states, now, self._limits, self._since, "of the run")
        self._stuck = {rank: self._stuck.get(rank, now) for rank in verdict.stalled}
        self._asked &= self._stuck.keys()
        if any(now - self._stuck[rank] < _DUMP_S for rank in verdict.kill):
            return {}
        return {rank: (beats[rank], verdict.stalled[rank], why) for rank, why in verdict.kill.items()}

    def wants_stacks(self, rank: int) -> bool:
        """True once for a rank that has fallen silent: where it waits belongs into its log before anybody is killed."""
        if rank not in self._stuck or rank in self._asked:
            return False
        self._asked.add(rank)
        return True
