"""Where the time of a run has gone: steps that were kept, steps that were trained again, and what is no training. Pure.

Goodput is the time spent on steps that were kept, divided by the time since submission.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """From which step and when an attempt began, the first with its submission, and when it ended; times in seconds since the
    epoch, None while it goes on.
    """

    number: int
    from_step: int
    begun_at: float
    ended_at: float | None


@dataclass(frozen=True)
class Breakdown:
    """Seconds since submission, in parts that add up to `wall_s`.

    `waiting_s` is from the beginning of each attempt to its first logged step: queue, start, loading. `between_s` lies between
    attempts, `other_s` is the rest of the attempts, such as the final export.
    """

    wall_s: float
    kept_s: float
    replayed_s: float
    evaluation_s: float
    save_stalls_s: float
    waiting_s: float
    between_s: float
    other_s: float

    @property
    def goodput(self) -> float:
        """0 to 1."""
        return self.kept_s / self.wall_s if self.wall_s > 0 else 0.0


def breakdown(lines: Sequence[dict[str, Any]], attempts: Sequence[Attempt], now: float) -> Breakdown:
    """Tell from all lines of metrics.jsonl, as they were written, where the time between the first attempt and its end went.

    A line stands for the steps since the one logged before it in its attempt, which took as long as it did.
    """
    if not attempts:
        return Breakdown(0, 0, 0, 0, 0, 0, 0, 0)
    end = attempts[-1].ended_at or now
    kept_by = {line["trainer/step"]: line["attempt"] for line in lines if "train/loss" in line}
    kept = replayed = evaluation = stalls = waiting = between = 0.0
    before = attempts[0].begun_at
    for attempt in attempts:
        own = [line for line in lines if line["attempt"] == attempt.number]
        trained = [line for line in own if "train/loss" in line]
        last = attempt.from_step
        for line in trained:
            seconds = line["time/step_s"] * max(1, line["trainer/step"] - last)
            last = line["trainer/step"]
            kept += seconds if kept_by[last] == attempt.number else 0.0
            replayed += seconds if kept_by[last] != attempt.number else 0.0
        evaluation += sum(line.get("time/eval_s", 0.0) for line in own)
        stalls += sum(line.get("ckpt/stall_s", 0.0) for line in own)
        between += max(0.0, attempt.begun_at - before)
        before = attempt.ended_at or end
        first = trained[0] if trained else None
        stood_for = 0 if first is None else first["time/step_s"] * max(1, first["trainer/step"] - attempt.from_step)
        waiting += max(0.0, (before if first is None else first["time"] - stood_for) - attempt.begun_at)
    wall = end - attempts[0].begun_at
    other = max(0.0, wall - kept - replayed - evaluation - stalls - waiting - between)
    return Breakdown(wall, kept, replayed, evaluation, stalls, waiting, between, other)
