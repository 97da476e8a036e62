"""The progress of ranks that are loading the model, which takes seconds to an hour and sends no heartbeats.

A loading rank reads files or touches memory for the first time; the kernel counts both for each process. Most ranks wait for one
that progresses, possibly on another node, so the nodes of a job share a counter of the progress that they see.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.worker.ranks.heartbeat import Beat

if TYPE_CHECKING:
    from torch.distributed import Store

# A rank that only waits logs or allocates less than this.
_MIN_BYTES = 1 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_COUNTER = "load_progress"
_HANGS = "hangs"
_JOIN_S = 5.0
# A head node that has not answered for this long hangs or is cut off.
_UNANSWERED_S = 5.0
# Seconds between a failed request and the next one.
_RETRY_S = 5.0


class LoadProgress:
    """Remembers when each rank last progressed."""

    def __init__(self) -> None:
        # The bytes of each process when it last progressed, and that time.
        self._marks: dict[int, tuple[int, float]] = {}

    def update(self, beats: Mapping[int, Beat], now: float) -> dict[int, Beat]:
        """For ranks that have not begun to train, replace the heartbeats' times with the times of their last progress."""
        for pid in (beat.pid for beat in beats.values() if not beat.trained):
            num_bytes = count_bytes(pid)
            if pid not in self._marks or num_bytes - self._marks[pid][0] >= _MIN_BYTES:
                self._marks[pid] = num_bytes, now
        loading = {rank: beat for rank, beat in beats.items() if not beat.trained}
        return {**beats, **{rank: replace(beat, at=max(beat.at, self._marks[beat.pid][1])) for rank, beat in loading.items()}}


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
    with suppress(OSError, ValueError):
        read = re.search(r"rchar: (\d+)", Path(f"/proc/{pid}/io").read_text())
        # minflt and majflt, counted from the field after the name (proc_pid_stat(5)).
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(read[1] if read else 0) + (int(stat[7]) + int(stat[9])) * _PAGE_BYTES
    return 0
