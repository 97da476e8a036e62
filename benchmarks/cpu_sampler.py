"""CPU seconds of a run's ranks at the end of each step, to time steps on a machine that other programs use too."""

from __future__ import annotations

import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil

_INTERVAL_S = 0.02


class CpuSampler(threading.Thread):
    """Samples the CPU seconds of the ranks (this process's busiest descendants) whenever a run in `folder` logs a step."""

    def __init__(self, folder: Path, num_ranks: int) -> None:
        super().__init__(daemon=True)
        self._folder, self._num_ranks = folder, num_ranks
        self._is_over = threading.Event()
        self._logged: list[float] = []

    def __enter__(self) -> CpuSampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()

    def run(self) -> None:
        num_bytes = 0
        while not self._is_over.wait(_INTERVAL_S):
            with suppress(OSError):
                sizes = [file.stat().st_size for file in self._folder.glob("*/bench/metrics.jsonl")]
                if sum(sizes) > num_bytes:
                    num_bytes = sum(sizes)
                    self._logged.append(self._mean_cpu_s())

    def _mean_cpu_s(self) -> float:
        seconds = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds.append(times.user + times.system)
        return sum(sorted(seconds)[-self._num_ranks :]) / self._num_ranks

    def seconds_of_steps(self, warmup: int) -> list[float]:
        """Return the CPU seconds of each step after the first `warmup` steps, averaged over ranks."""
        return [end - start for start, end in pairwise(self._logged)][warmup - 1 :]
