"""A run's state, remaining time and cost from its files, for programs and for the lines of `status`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from launcher import run_store
from launcher.checkpoint import store
from launcher.cli.follow import wandb_page
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Status, read_export
from launcher.run_store import Placement
from launcher.tracking import goodput, progress
from launcher.tracking.goodput import Breakdown
from launcher.tracking.jsonl import read_events
from launcher.tracking.metrics import median_names
from launcher.tracking.run_metrics import MetricsTail, newest_trained_step, read_tail
from launcher.tracking.verdicts import read_newest_verdict

# The remaining time is omitted after this time, and this many steps, without a report. An evaluation takes minutes.
_SILENT_S, _SILENT_STEPS = 600.0, 10


def summary(run: RunDir, status: Status) -> dict[str, Any]:
    """Return the state, the metrics of the last training step, and values derived from both.

    `attempt` is the newest attempt, which may still be waiting for machines. `age_s` is the time since the last step was
    reported.
    """
    number = max(status.attempt, run_store.newest_attempt(run))
    resumed = _resumed(run)
    tail = read_tail(run.metrics, resumed=resumed)
    placed = run_store.read_placement(run)
    checkpoints = [checkpoint.step for checkpoint in store.list_checkpoints(run.checkpoints)]
    events = read_events(run.events)
    spent = _spent(run, status)
    step, medians = newest_trained_step(run, status), _medians(tail.recent)
    age_s = _age_s(tail, status, step)
    rest = None
    if status.state in RUNNING_STATES:
        # Without the attempt's files, it continues from the last known step.
        resumed_from = resumed.get(number, int(tail.last.get("trainer/step", 0)))
        start_step = _start_step(tail, status, number, resumed_from, checkpoints)
        rest = _remaining(tail, status, medians, start_step, age_s, _Costs.of(tail, spent, placed))
    return {
        "name": run.root.name,
        "dir": str(run.root),
        **asdict(status),
        "attempt": number,
        "step": step,
        "age_s": age_s,
        "metrics": tail.last,
        "usual": medians,
        "losses": list(tail.losses),
        "eval_loss": tail.eval_loss,
        "eval_step": tail.eval_step,
        "left_s": None if rest is None else rest.seconds,
        "limit": None if rest is None else rest.limit,
        "asked_to_stop": status.state in RUNNING_STATES and run.cancel(number).is_file(),
        "checkpoints": checkpoints,
        "export": str(run.export) if run.export.is_dir() else None,
        "export_step": exported.step if run.export.is_dir() and (exported := read_export(run)) is not None else None,
        "device": placed.device,
        "cost": _cost(tail, spent, placed, None if rest is None else rest.usd),
        "goodput": _goodput(spent or goodput.breakdown_from_metrics(tail.last)),
        "alerts": [{"time": e["time"], "step": e["step"], "text": e["text"]} for e in events if e["kind"] == "alert"],
        "wandb": wandb_page(run, events),
        "progress": _progress(events, number) if status.state in RUNNING_STATES else None,
        "answers": next((e["text"] for e in reversed(events) if e["kind"] == "answers"), None),
        "verdict": _verdict(run),
        "mirror": next((e["text"] for e in reversed(events) if e["kind"] == "mirror"), None),
    }


def _verdict(run: RunDir) -> dict[str, Any] | None:
    """Return the newest verdict of an evaluation, or None if there is none, or it cannot be read."""
    with suppress(OSError, LauncherError):
        if (newest := read_newest_verdict(run)) is not None:
            return {"step": newest.step, "outcome": newest.verdict.outcome.value, "sentence": newest.verdict.sentence}
    return None


def _progress(events: Sequence[dict[str, Any]], attempt: int) -> dict[str, Any] | None:
    """Return the newest attempt's progress with its current activity, such as loading the weights, or None if unknown."""
    last = events[-1] if events else None
    if last is None or last["kind"] != progress.EVENT or last["attempt"] != attempt:
        return None
    return {"time": last["time"], "text": last["text"]}


def _resumed(run: RunDir) -> dict[int, int]:
    """Return the step from which each attempt continued, skipping unreadable attempts."""
    steps = {}
    for number in run_store.attempt_numbers(run):
        with suppress(LauncherError, OSError, TypeError, ValueError):
            steps[number] = run_store.read_attempt(run, number).resume_step or 0
    return steps


def _age_s(tail: MetricsTail, status: Status, step: int) -> float | None:
    """Return the seconds since the last step was reported; None before the first."""
    if not tail.last:
        return None
    # status.json also has the steps between logged ones.
    at = status.updated_at if step > tail.last["trainer/step"] else tail.last["time"]
    return max(0.0, time.time() - float(at))


def _start_step(tail: MetricsTail, status: Status, number: int, resumed_from: int, checkpoints: Sequence[int]) -> int | None:
    """Return the step from which the newest attempt will train, or None if it is already training."""
    has_trained = bool(tail.last) and tail.last["attempt"] == number
    if has_trained:
        # A requeued job continues from the newest checkpoint.
        return max(checkpoints, default=0) if status.state == "pending" else None
    return resumed_from


@dataclass(frozen=True)
class _Costs:
    """The cost of an active run; `usd_per_s` is per second with machines. Unknown values are None."""

    usd: float | None
    usd_per_s: float | None
    held_s: float
    logged_usd: float | None
    max_usd: float | None
    max_hours: float | None

    @classmethod
    def of(cls, tail: MetricsTail, spent: Breakdown | None, placed: Placement) -> _Costs:
        logged = None if tail.spent is None else tail.spent.usd
        usd = spent.usd if spent is not None and spent.gpu_s else logged
        num_gpus = max(placed.num_ranks, 0 if spent is None else spent.num_workers)
        usd_per_s = None if placed.price is None else num_gpus * placed.price.usd_per_gpu_hour / 3600
        return cls(usd, usd_per_s, 0.0 if spent is None else spent.held_s, logged, placed.max_usd, placed.max_hours)

    def limit(self) -> tuple[str, float] | None:
        """Return the limit that will be reached first and the seconds with machines until then, or None if there is no limit."""
        limits = []
        if self.max_hours is not None:
            limits.append((f"run.max_hours={self.max_hours:g}", self.max_hours * 3600 - self.held_s))
        if self.max_usd is not None and self.usd is not None and self.usd_per_s:
            limits.append((f"run.max_usd={self.max_usd:g}", (self.max_usd - self.usd) / self.usd_per_s))
        return min(limits, key=lambda one: one[1], default=None)


@dataclass(frozen=True)
class _Remaining:
    """The remainder of a run: seconds, US dollars at the end, and the limit that stops it early."""

    seconds: float | None
    usd: float | None
    limit: str | None


def _remaining(
    tail: MetricsTail, status: Status, medians: dict[str, float], start_step: int | None, age_s: float | None, costs: _Costs
) -> _Remaining:
    """Return the remainder of an active run: from its last step, or from median step times if it will train from `start_step`."""
    step_s = medians.get("time/step_s", math.nan)
    if start_step is None:
        left_s = tail.last.get("trainer/eta_s", math.nan)
        # The last line's estimate still includes steps that have been paid for since then.
        from_usd = costs.usd if costs.usd is None or costs.logged_usd is None else min(costs.usd, costs.logged_usd)
        is_silent = age_s is not None and age_s > max(_SILENT_S, _SILENT_STEPS * (step_s if step_s > 0 else 0.0))
    else:
        left_s = max(0, status.max_steps - start_step) * step_s if status.max_steps else math.nan
        from_usd, is_silent = costs.usd, False
    if is_silent or not math.isfinite(left_s):
        return _Remaining(None, None, None)
    limit, by_limit = None, costs.limit()
    if by_limit is not None and by_limit[1] < left_s:
        limit, left_s, from_usd = by_limit[0], max(0.0, by_limit[1]), costs.usd
    usd = None
    if costs.usd is not None and from_usd is not None and costs.usd_per_s is not None:
        usd = max(costs.usd, from_usd + costs.usd_per_s * left_s)
    return _Remaining(left_s, usd, limit)


def _medians(recent: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return medians over the last steps of metrics that vary from step to step."""
    values = {name: [line[name] for line in recent if name in line] for name in median_names()}
    return {name: statistics.median(numbers) for name, numbers in values.items() if numbers}


def _spent(run: RunDir, status: Status) -> Breakdown | None:
    """Return where the time went until now or the run's end, or None if its files do not show it."""
    with suppress(LauncherError, OSError, KeyError, TypeError, ValueError):
        return goodput.read(run, time.time(), status.state) if run_store.attempt_numbers(run) else None
    return None


def _goodput(spent: Breakdown | None) -> dict[str, float] | None:
    """Return the time since submission and its parts in seconds; None before the first kept step."""
    if spent is None or not spent.kept_s:
        return None
    lost = {name: getattr(spent, name) for name in goodput.LOST}
    return {"fraction": spent.goodput, "wall_s": spent.wall_s, "kept_s": spent.kept_s, **lost, "lost_steps": spent.lost_steps}


def _cost(tail: MetricsTail, spent: Breakdown | None, placed: Placement, expected_usd: float | None) -> dict[str, Any] | None:
    """Return GPU hours and US dollars so far, plus estimated dollars at the end if possible; None if nothing is counted.

    Without the attempts' files, the last metrics line with a cost counts.
    """
    counted = tail.spent
    typical = placed.price is not None and placed.price.assumption is not None
    if spent is not None and spent.gpu_s:
        if placed.device == "cpu" and placed.price is None:
            return None
        hours, usd, typical = spent.gpu_s / 3600, spent.usd, spent.assumed_usd > 0
    elif counted is not None:
        hours, usd = counted.gpu_hours, counted.usd
    else:
        return None
    return {"gpu_hours": hours, "usd": usd, "expected_usd": expected_usd, "at_typical_price": typical}
