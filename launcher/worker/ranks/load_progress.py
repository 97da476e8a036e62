"""The progress of ranks that are loading the model, which takes seconds to an hour and sends no heartbeats.

A loading rank reads files, touches memory for the first time, or waits for compilers that it started, which touch memory too.
The kernel counts bytes read and page faults for each process. Most ranks wait for one that progresses, possibly on another
node, so the nodes of a job share a counter of the progress that they see.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.worker.ranks.heartbeat import Beat

if TYPE_CHECKING:
    from torch.distributed import Store

# A rank that only waits logs or allocates less than this.
_MIN_BYTES = 1 << 20
# The least memory that a compiler touches. A rank's helper processes, such as the one that sends metrics, touch less over minutes
# but read all the time, so reads by a rank's descendants do not count.
_MIN_COMPILER_BYTES = 16 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_COUNTER = "load_progress"
_HANGS = "hangs"
_JOIN_S = 5.0
# A head node that has not answered for this long hangs or is cut off.
_UNANSWERED_S = 5.0
# Seconds between a failed request and the next one.
_RETRY_S = 5.0
# Fields of /proc/PID/stat, counted from the field after the name (proc_pid_stat(5)): the parent; minflt and majflt; and cminflt
# and cmajflt, the same counts for descendants that have ended.
_PARENT, _FAULTS, _ENDED_FAULTS = 1, (7, 9), (8, 10)


@dataclass(frozen=True)
class _Mark:
    num_bytes: int
    at: float


class LoadProgress:
    """Remembers when each rank last progressed."""

    def __init__(self) -> None:
        self._own, self._compilers = _Marks(_MIN_BYTES), _Marks(_MIN_COMPILER_BYTES)

    def update(self, beats: Mapping[int, Beat], now: float) -> dict[int, Beat]:
        """For ranks that have not begun to train, replace the heartbeats' times with the times of their last progress."""
        loading = {beat.pid for beat in beats.values() if not beat.trained}
        seen = {pid: self._own.seen(pid, count_bytes(pid), now, at_first=now) for pid in loading}
        # Scanning all processes of a machine takes a while.
        waiting = [pid for pid, at in seen.items() if at < now]
        for pid, num_bytes in _count_descendants(waiting).items():
            seen[pid] = max(seen[pid], self._compilers.seen(pid, num_bytes, now, at_first=-math.inf))
        return {rank: beat if beat.trained else replace(beat, at=max(beat.at, seen[beat.pid])) for rank, beat in beats.items()}


class _Marks:
    """Remembers when the counts of processes last grew by `min_bytes`."""

    def __init__(self, min_bytes: int) -> None:
        self._min_bytes = min_bytes
        self._marks: dict[int, _Mark] = {}

    def seen(self, pid: int, num_bytes: int, now: float, at_first: float) -> float:
        mark = self._marks.get(pid, _Mark(num_bytes, at_first))
        if num_bytes - mark.num_bytes >= self._min_bytes:
            mark = _Mark(num_bytes, now)
        # Counts of processes that outlive their parent are lost.
        self._marks[pid] = _Mark(min(mark.num_bytes, num_bytes), mark.at)
        return mark.at


class SharedProgress:
    """Two counters in the head node's store: progress on all nodes, and the hangs that they have noticed.

    A separate thread with its own connection talks to the store: a head node that does not answer must not block the watchdog.
    """

    def __init__(self, store: Store, interval_s: float) -> None:
        self._store, self._interval_s = store, interval_s
        self._has_progressed = self._has_hang = self._has_others_hang = False
        self._changed_at, self._asked_at = time.monotonic(), math.inf
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._share, name="load-progress", daemon=True)
        self._thread.start()

    @property
    def changed_at(self) -> float:
        """When progress on any node was last seen, by time.monotonic(); inf if the store is unreachable or silent."""
        return self._changed_at if time.monotonic() - self._asked_at < _UNANSWERED_S else math.inf

    def report(self) -> None:
        """Tell the other nodes that a rank on this node is making progress."""
        self._has_progressed = True

    def report_hang(self) -> None:
        """Tell the other nodes that a rank on this node is silent."""
        self._has_hang = True

    def has_others_hang(self) -> bool:
        """Return whether another node has reported a hang since the last call."""
        has_others_hang, self._has_others_hang = self._has_others_hang, False
        return has_others_hang

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(_JOIN_S)

    def _share(self) -> None:
        connection, last, num_hangs, wait_s = None, -1, -1, self._interval_s
        while not self._ended.wait(wait_s):
            has_progressed, self._has_progressed = self._has_progressed, False
            has_hang, self._has_hang = self._has_hang, False
            self._asked_at = asked_at = time.monotonic()
            try:
                connection = connection or self._store.clone()
                count = connection.add(_COUNTER, int(has_progressed))
                hangs = connection.add(_HANGS, int(has_hang))
            except RuntimeError:
                # Nothing is known about the other nodes until the head node answers again. Use another connection for that: a
                # late answer to this request would be taken for the answer to the next one.
                self._changed_at, self._has_progressed = math.inf, self._has_progressed or has_progressed
                self._has_hang = self._has_hang or has_hang
                connection, last, wait_s = None, -1, _RETRY_S
                continue
            wait_s = self._interval_s
            now = time.monotonic()
            # While the head node was silent, the other nodes could not report progress either.
            if count != last or now - asked_at >= _UNANSWERED_S:
                last, self._changed_at = count, now
            # Hangs from before this node first looked are over, or this node noticed them itself.
            self._has_others_hang |= 0 <= num_hangs < hangs - int(has_hang)
            num_hangs = hangs
            self._asked_at = math.inf


def count_bytes(pid: int) -> int:
    """Return the bytes that a process has read plus the bytes of the pages that it has touched; 0 if it cannot be seen."""
    stat = _stat(pid)
    if not stat:
        return 0
    try:
        read = next((int(line.split()[1]) for line in Path(f"/proc/{pid}/io").read_text().splitlines() if "rchar" in line), 0)
    except (OSError, ValueError):
        read = 0
    return read + _touched(stat, _FAULTS)


def _count_descendants(pids: Collection[int]) -> dict[int, int]:
    """Return the bytes of the pages that each process's descendants have touched, including descendants that have ended."""
    if not pids:
        return {}
    stats: dict[int, list[str]] = {}
    children = defaultdict(list)
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(int(entry))):
            stats[int(entry)] = stat
            children[int(stat[_PARENT])].append(int(entry))

    def count(pid: int) -> int:
        living = sum(_touched(stats[child], _FAULTS) + count(child) for child in children[pid])
        return living + _touched(stats[pid], _ENDED_FAULTS)

    return {pid: count(pid) for pid in pids if pid in stats}


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name; no fields if the process cannot be seen."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _touched(stat: list[str], fields: tuple[int, ...]) -> int:
    return sum(int(stat[field]) for field in fields) * _PAGE_BYTES
