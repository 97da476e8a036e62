"""Finds a hung worker or rank of a group: workers report their ranks' progress, and all nodes are compared."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import replace

import psutil

from launcher.worker.ranks.watchdog import DUMP_S, Beat, HeartbeatTable, LoadProgress, StallLimits, is_loading, stalled
from launcher.worker.ray.messages import RankSign

# Workers send several heartbeats a second. One that is silent for this long is cut off, or its machine hangs. If the limit for
# a stalled rank is shorter, it applies to workers too.
SILENT_S = 60.0
# A worker's heartbeat counts as evidence for this long, or for this share of the stall limit if that is less.
_FRESH_S, _FRESH_SHARE = 10.0, 0.2


class Observer:
    """The worker's side: reads its rank's last heartbeat. Silence counts only while the worker itself was running."""

    def __init__(self, table: HeartbeatTable, local_rank: int, stall_s: float) -> None:
        self._table, self._local_rank, self._gap_s = table, local_rank, stall_s / 2
        self._looked = self._since = time.monotonic()
        self._progress = LoadProgress()

    def sign(self, pid: int) -> RankSign | None:
        """Return the last heartbeat of the process `pid`, or None if it has sent none or has ended.

        The seconds in it count from the heartbeat or, for a loading rank, from its last progress.
        """
        now = time.monotonic()
        if now - self._looked > self._gap_s:
            # This process was suspended, and perhaps its rank too.
            self._since = now
        self._looked = now
        beat = self._table.read().get(self._local_rank)
        if beat is None or beat.pid != pid:
            return None
        beat = self._progress.update({self._local_rank: beat}, now)[self._local_rank]
        try:
            state = psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            return None
        return RankSign(beat, max(0.0, now - max(beat.at, self._since)), state)


class GroupLiveness:
    """The coordinator's side: the last heartbeat of each worker, keyed by its rank in the group, and of the rank it runs."""

    def __init__(self, limits: StallLimits) -> None:
        self._limits = limits
        self._silent_s = min(limits.stall_s or SILENT_S, SILENT_S)
        self._gap_s = self._silent_s / 2
        self._heard: dict[int, float] = {}
        self._beats: dict[int, Beat] = {}
        self._states: dict[int, str] = {}
        self._stuck: dict[int, float] = {}
        self._dumped: set[int] = set()
        self._called = self._since = time.monotonic()

    def hear(self, rank: int, sign: RankSign | None = None) -> None:
        now = time.monotonic()
        if now - self._called > self._gap_s:
            # The coordinator itself was blocked, for example by slow storage.
            self._since = now
        self._called = self._heard[rank] = now
        if sign is not None:
            self._beats[rank] = replace(sign.beat, at=now - sign.silent_s)
            self._states[rank] = sign.process_state

    def silent(self, ranks: Collection[int]) -> dict[int, float]:
        """Return the `ranks` whose workers have been silent for too long, with the seconds; includes workers never heard from."""
        now = time.monotonic()
        seconds = {rank: now - max(self._heard.get(rank, self._since), self._since) for rank in ranks}
        return {rank: silence for rank, silence in seconds.items() if silence > self._silent_s}

    def have_stopped(self, ranks: Collection[int]) -> bool:
        """Return whether all of `ranks` are loading or have trained, and none has progressed within its limit: they wait or hang.

        Finishing has no limit.
        """
        if self._limits.stall_s <= 0:
            return False
        now, beats = time.monotonic(), [self._beats.get(rank) for rank in ranks]
        return all(
            b is not None and (b.trained or is_loading(b)) and now - max(b.at, self._since) > self._limits.of(b) for b in beats
        )

    def phases(self, ranks: Collection[int]) -> set[str]:
        """Return the phases of `ranks` at their last heartbeats."""
        return {self._beats[rank].phase for rank in ranks if rank in self._beats}

    def hung(self, ranks: Collection[int]) -> dict[int, tuple[Beat, float, str]]:
        """Return the `ranks` to kill, each with its last heartbeat, the seconds since then, and the reason.

        No rank is judged while any worker is silent: the silent worker's rank may be the culprit, or may have progressed.
        """
        now, fresh_s = time.monotonic(), min(_FRESH_S, _FRESH_SHARE * self._limits.stall_s)
        if self._limits.stall_s <= 0 or any(now - self._heard.get(rank, self._since) > fresh_s for rank in ranks):
            return {}
        beats = {rank: self._beats[rank] for rank in ranks if rank in self._beats}
        # Nothing is known about a rank whose worker is still importing; imports have their own deadline.
        others_at = -math.inf if len(beats) == len(ranks) else math.inf
        verdict = stalled(beats, self._states, now, self._limits, self._since, others_at, "of the run")
        self._stuck = {rank: self._stuck.get(rank, now) for rank in verdict.stalled}
        if not self._stuck:
            self._dumped.clear()
        if any(now - self._stuck[rank] < DUMP_S for rank in verdict.kill):
            return {}
        return {rank: (beats[rank], verdict.stalled[rank], reason) for rank, reason in verdict.kill.items()}

    def wants_stacks(self, rank: int) -> bool:
        """Return True once for each rank while any rank is stalled.

        Logs and flight recorders must show where all ranks wait before any rank is killed, and a rank that waits for a stalled
        one may become late only after that.
        """
        if not self._stuck or rank in self._dumped:
            return False
        self._dumped.add(rank)
        return True
