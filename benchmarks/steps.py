"""What every measured side reports: the wall-clock time and the real tokens of each optimizer step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


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
