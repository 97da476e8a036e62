"""The progress of ranks that load the model, which takes from seconds to an hour and sends no heartbeats.

A rank that loads reads files, or touches memory for the first time; or it waits for compilers that it has started, which touch
memory. The kernel counts both for each process. Most ranks wait for one that progresses, which may be on another node; so the
nodes of a job share a counter of the progress that they see.
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

# Less than this is written to logs or allocated by a rank that only waits.
_MIN_BYTES = 1 << 20
# The least memory that a compiler touches. Helpers of a rank, such as the process that sends metrics, touch less in minutes, but
# read all the time; so what a rank's descendants read does not count.
_MIN_COMPILER_BYTES = 16 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_COUNTER = "load_progress"
_HANGS = "hangs"
_JOIN_S = 5.0
# A head node that has not answered for so long hangs, or is cut off.
_UNANSWERED_S = 5.0
# From a failed request to the next one.
_RETRY_S = 5.0
# Fields of /proc/PID/stat, counted from the field after the name (proc_pid_stat(5)): the parent; minflt and majflt; cminflt and
# cmajflt, which are those of the ended descendants.
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
        """Return the heartbeats with the times of the last progress, for ranks that have not begun to train."""
        loading = {beat.pid for beat in beats.values() if not beat.trained}
        seen = {pid: self._own.seen(pid, count_bytes(pid), now, at_first=now) for pid in loading}
        # Reading the records of all processes of a machine takes a while.
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
        # Counts of processes whose parent has ended before them are lost.
        self._marks[pid] = _Mark(min(mark.num_bytes, num_bytes), mark.at)
        return mark.at


class SharedProgress:
    """A counter of the progress on all nodes, and one of the hangs that they have noticed, in the store of the head node.

    A thread of its own talks to the store, over a connection of its own: a head node that does not answer must not block the
    watchdog.
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
        """When progress on any node was last seen, by time.monotonic(); inf where the store cannot be reached or is silent."""
        return self._changed_at if time.monotonic() - self._asked_at < _UNANSWERED_S else math.inf

    def report(self) -> None:
        """Tell the other nodes that a rank of this one progresses."""
        self._has_progressed = True

    def report_hang(self) -> None:
        """Tell the other nodes that a rank of this one is silent."""
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
                # Nothing is known of the others until the head node answers again, over another connection: the answer to this
                # request may still come and would be taken for that to the next.
                self._changed_at, self._has_progressed = math.inf, self._has_progressed or has_progressed
                self._has_hang = self._has_hang or has_hang
                connection, last, wait_s = None, -1, _RETRY_S
                continue
            wait_s = self._interval_s
            now = time.monotonic()
            # The others could not tell of their progress either while the head node was silent.
            if count != last or now - asked_at >= _UNANSWERED_S:
                last, self._changed_at = count, now
            # Those from before this node looked are over, or it has noticed them by itself.
            self._has_others_hang |= 0 <= num_hangs < hangs - int(has_hang)
            num_hangs = hangs
            self._asked_at = math.inf


def count_bytes(pid: int) -> int:
    """Return the bytes that a process has read, and those of the pages that it has touched; 0 where it cannot be seen."""
    stat = _stat(pid)
    if not stat:
        return 0
    try:
        read = next((int(line.split()[1]) for line in Path(f"/proc/{pid}/io").read_text().splitlines() if "rchar" in line), 0)
    except (OSError, ValueError):
        read = 0
    return read + _touched(stat, _FAULTS)


def _count_descendants(pids: Collection[int]) -> dict[int, int]:
    """Return the bytes of the pages that the descendants of each process have touched, also those that have ended."""
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
    """Return the fields of /proc/PID/stat after the name; none where the process cannot be seen."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _touched(stat: list[str], fields: tuple[int, ...]) -> int:
    return sum(int(stat[field]) for field in fields) * _PAGE_BYTES
