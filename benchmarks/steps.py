"""The figures that every side reports: wall-clock time and real tokens of each optimizer step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import psutil


def faster_half(values: Sequence[float]) -> float:
    """Return the median of the smaller half, to which other programs on the machine have added the least time."""
    return statistics.median(sorted(values)[: (len(values) + 1) // 2])


def start_of_process(pid: int | None = None) -> float:
    """Return when a process started, by default this one, in seconds since the epoch.

    psutil's own time is up to a second earlier: Linux tells the time of the boot, which psutil adds, in whole seconds.
    """
    after_boot = psutil.Process(pid).create_time() - psutil.boot_time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + after_boot


def peak_gib() -> float | None:
    """Return the most memory that torch reserved on this process's GPU; None without a GPU."""
    import torch

    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None


def summarize(started: float, began: float, times: Sequence[float], tokens: Sequence[int], warmup: int) -> dict[str, Any]:
    """Return the figures of one run. Times are in seconds since the epoch: `started` is the start of the command, `began` the
    beginning of the first step, and `times` the end of each step. `tokens` are those of each step, without padding.

    The rate excludes the first `warmup` steps, and covers everything between them and the end of the last step.
    """
    if not 0 < warmup < len(times):
        raise ValueError(f"{len(times)} steps leave nothing to measure after {warmup} steps of warm-up")
    return {
        "steps": len(times),
        "to_first_step_s": began - started,
        "first_step_s": times[0] - started,
        "step_s": statistics.median(end - start for start, end in zip(times[warmup - 1 :], times[warmup:], strict=False)),
        "tokens_per_sec": sum(tokens[warmup:]) / (times[-1] - times[warmup - 1]),
    }
