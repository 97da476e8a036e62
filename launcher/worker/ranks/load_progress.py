"""The progress of ranks that load the model, which takes from seconds to an hour and sends no heartbeats.

A rank that loads reads files, or touches memory for the first time. The kernel counts both for each process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.worker.ranks.heartbeat import Beat

# Less than this is written to logs or allocated by a rank that only waits.
_MIN_BYTES = 1 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
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
