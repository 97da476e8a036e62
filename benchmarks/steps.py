"""What every measured side reports: the wall-clock time and the real tokens of each optimizer step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def faster_half(values: Sequence[float]) -> float:
    """Return the median of the smaller half: seconds that other programs on the machine have added least to."""
    return statistics.median(sorted(values)[: (len(values) + 1) // 2])


def peak_gib() -> float | None:
    """Return the most memory that torch has reserved on this process's GPU; None without a GPU."""
    import torch

    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None


def summarize(started: float, began: float, times: Sequence[float], tokens: Sequence[int], warmup: int) -> dict[str, Any]:
    """Figures of one run. Seconds since the epoch are `started`, when the command was given, `began`, when the first step did,
    and `times`, at which each step ended; `tokens` are those of each step, without padding.

    The first `warmup` steps are left out of the rate, which spans everything between them and the last step's end.
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
