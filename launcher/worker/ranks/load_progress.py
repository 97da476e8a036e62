"""The progress of ranks that load the model, which takes from seconds to an hour and sends no heartbeats.

A rank that loads reads files, or touches memory for the first time. The kernel counts both for each process. Most ranks wait for
one that reads, which may be on another node; so the nodes of a job share a counter of the progress that they see.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.worker.ranks.heartbeat import Beat

if TYPE_CHECKING:
    from torch.distributed import Store

# Less than this is written to logs or allocated by a rank that only waits.
_MIN_BYTES = 1 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_COUNTER = "load_progress"
_JOIN_S = 5.0
# The fields minflt and majflt of /proc/PID/stat, counted from the field after the name; see proc_pid_stat(5).
_FAULTS = (7, 9)


@dataclass(frozen=True)
class _Mark:
    num_bytes: int
    at: float


class LoadProgress:
    """Remembers when each rank last progressed."""

    def __init__(self) -> None:
        self._marks: dict[int, _Mark] = {}

    def update(self, beats: Mapping[int, Beat], now: float) -> dict[int, Beat]:
        """Return the heartbeats with the times of the last progress, for ranks that have not begun to train."""
        return {
            rank: beat if beat.trained else replace(beat, at=max(beat.at, self._seen(beat, now))) for rank, beat in beats.items()
        }

    def _seen(self, beat: Beat, now: float) -> float:
        num_bytes = count_bytes(beat.pid)
        mark = self._marks.get(beat.pid)
        if mark is None or num_bytes - mark.num_bytes >= _MIN_BYTES:
            mark = self._marks[beat.pid] = _Mark(num_bytes, now)
        return mark.at


class SharedProgress:
    """A counter of the progress on all nodes, in the store of the head node.

    A thread of its own talks to the store, over a connection of its own: a head node that does not answer must not block the
    watchdog.
    """

    def __init__(self, store: Store, interval_s: float) -> None:
        self._store, self._interval_s = store.clone(), interval_s
        self._has_progressed = False
        self._changed_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._share, name="load-progress", daemon=True)
        self._thread.start()

    @property
    def changed_at(self) -> float:
        """When progress on any node was last seen, by time.monotonic(); inf where the store cannot be reached."""
        return self._changed_at

    def report(self) -> None:
        """Tell the other nodes that a rank of this one progresses."""
        self._has_progressed = True

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(_JOIN_S)

    def _share(self) -> None:
        last = -1
        while not self._ended.wait(self._interval_s):
            has_progressed, self._has_progressed = self._has_progressed, False
            try:
                count = self._store.add(_COUNTER, int(has_progressed))
            except RuntimeError:
                # Without the head node the job ends; nothing is known of the others until then.
                self._changed_at = math.inf
                return
            if count != last:
                last, self._changed_at = count, time.monotonic()


def count_bytes(pid: int) -> int:
    """Return the bytes that a process has read, and those of the pages that it has touched; 0 where it cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        num_faults = sum(int(stat[field]) for field in _FAULTS)
    except (OSError, ValueError, IndexError):
        return 0
    try:
        read = next((int(line.split()[1]) for line in Path(f"/proc/{pid}/io").read_text().splitlines() if "rchar" in line), 0)
    except (OSError, ValueError):
        read = 0
    return read + num_faults * _PAGE_BYTES
