"""What a run is doing, how long it will take and what it costs, from its files: for programs, and for the lines of `status`."""

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
from launcher.run_records import RUNNING_STATES, Status
from launcher.run_store import Placement
from launcher.tracking import goodput
from launcher.tracking.goodput import Breakdown
from launcher.tracking.jsonl import read_events
from launcher.tracking.metrics import median_names
from launcher.tracking.metrics_tail import MetricsTail, newest_trained_step, read_tail

# Without a word for longer than that, and for so many steps, nobody knows when the run will end. An evaluation takes minutes.
_SILENT_S, _SILENT_STEPS = 600.0, 10


def summary(run: RunDir, status: Status) -> dict[str, Any]:
    """The state, the newest training step's metrics, and what follows from both; files may be missing.

    `attempt` is the newest, which may still wait for machines. `age_s` is since the newest step was told.
    """
    number = max(status.attempt, run_store.newest_attempt(run))
    resumed = _resumed(run)
    seen = read_tail(run.metrics, resumed=resumed)
    # Files that were copied may be without a plan.
    placed = run_store.read_placement(run) if run.plan.is_file() else None
    checkpoints = [checkpoint.step for checkpoint in store.list_checkpoints(run.checkpoints)]
    events = read_events(run.events)
    spent = _spent(run, status)
    step, usual = newest_trained_step(run, status), _usual(seen.recent)
    age_s = _age_s(seen, status, step)
    rest = None
    if status.state in RUNNING_STATES:
        # Where the attempts' files are missing, it goes on where the one before was.
        resumed_from = resumed.get(number, int(seen.last.get("trainer/step", 0)))
        begin = _begin(seen, status, number, resumed_from, checkpoints)
        rest = _rest(seen, status, usual, begin, age_s, _Paid.of(seen, spent, placed))
    return {
        "name": run.root.name,
        "dir": str(run.root),
        **asdict(status),
        "attempt": number,
        "step": step,
        "age_s": age_s,
        "metrics": seen.last,
        "usual": usual,
        "losses": list(seen.losses),
        "eval_loss": seen.eval_loss,
        "eval_step": seen.eval_step,
        "left_s": None if rest is None else rest.seconds,
        "limit": None if rest is None else rest.limit,
        "asked_to_stop": status.state in RUNNING_STATES and run.cancel(number).is_file(),
        "checkpoints": checkpoints,
        "device": placed.device if placed is not None else "cuda",
        "cost": _cost(seen, spent, placed, None if rest is None else rest.usd),
        "goodput": _goodput(spent or goodput.breakdown_from_metrics(seen.last)),
        "alerts": [{"time": e["time"], "step": e["step"], "text": e["text"]} for e in events if e["kind"] == "alert"],
        "wandb": wandb_page(events),
        "mirror": next((e["text"] for e in reversed(events) if e["kind"] == "mirror"), None),
    }


def _resumed(run: RunDir) -> dict[int, int]:
    """The step from which each attempt has gone on; those that cannot be read are left out."""
    found = {}
    for number in run_store.attempt_numbers(run):
        with suppress(LauncherError, OSError, TypeError, ValueError):
            found[number] = run_store.read_attempt(run, number).resume_step or 0
    return found


def _age_s(seen: MetricsTail, status: Status, step: int) -> float | None:
    """Seconds since the newest step was told; None before the first."""
    if not seen.last:
        return None
    # status.json has the steps between those that are logged.
    at = status.updated_at if step > seen.last["trainer/step"] else seen.last["time"]
    return max(0.0, time.time() - float(at))


def _begin(seen: MetricsTail, status: Status, number: int, resumed_from: int, checkpoints: Sequence[int]) -> int | None:
    """The step from which the newest attempt will train; None where it does already."""
    has_trained = bool(seen.last) and seen.last["attempt"] == number
    if has_trained:
        # A job that waits again goes on from what is saved.
        return max(checkpoints, default=0) if status.state == "pending" else None
    return resumed_from


@dataclass(frozen=True)
class _Paid:
    """What a run that goes on pays: dollars for each second with machines, None where that is not known."""

    usd: float | None
    usd_per_s: float | None
    held_s: float
    logged_usd: float | None
    max_usd: float | None
    max_hours: float | None

    @classmethod
    def of(cls, seen: MetricsTail, spent: Breakdown | None, placed: Placement | None) -> _Paid:
        counted = seen.spent
        logged = None if counted is None else counted.usd
        usd = spent.usd if spent is not None and spent.gpu_s and placed is not None else logged
        num_gpus = _num_ranks(seen.last)
        price = counted.usd / counted.gpu_hours if counted is not None and counted.usd and counted.gpu_hours else None
        if placed is not None:
            num_gpus = max(placed.num_ranks, 0 if spent is None else spent.num_workers)
            price = None if placed.price is None else placed.price.usd_per_gpu_hour
        usd_per_s = None if num_gpus is None or price is None else num_gpus * price / 3600
        limits = (None, None) if placed is None else (placed.max_usd, placed.max_hours)
        return cls(usd, usd_per_s, 0.0 if spent is None else spent.held_s, logged, *limits)

    def limit(self) -> tuple[str, float] | None:
        """The limit that is reached first, and the seconds with machines until then; None without one."""
        found = []
        if self.max_hours is not None:
            found.append((f"run.max_hours={self.max_hours:g}", self.max_hours * 3600 - self.held_s))
        if self.max_usd is not None and self.usd is not None and self.usd_per_s:
            found.append((f"run.max_usd={self.max_usd:g}", (self.max_usd - self.usd) / self.usd_per_s))
        return min(found, key=lambda one: one[1], default=None)


@dataclass(frozen=True)
class _Rest:
    """What is left of a run: seconds, dollars at the end, and the limit that ends it before its last step."""

    seconds: float | None
    usd: float | None
    limit: str | None


def _rest(
    seen: MetricsTail, status: Status, usual: dict[str, float], begin: int | None, age_s: float | None, paid: _Paid
) -> _Rest:
    """Of a run that goes on: by its newest step, or by its usual ones before an attempt has trained, which is at step `begin`."""
    step_s = usual.get("time/step_s", math.nan)
    if begin is None:
        left_s = seen.last.get("trainer/eta_s", math.nan)
        # What has been paid since the newest line was for steps that its estimate still counts.
        from_usd = paid.usd if paid.usd is None or paid.logged_usd is None else min(paid.usd, paid.logged_usd)
        is_silent = age_s is not None and age_s > max(_SILENT_S, _SILENT_STEPS * (step_s if step_s > 0 else 0.0))
    else:
        left_s = max(0, status.max_steps - begin) * step_s if status.max_steps else math.nan
        from_usd, is_silent = paid.usd, False
    if is_silent or not math.isfinite(left_s):
        return _Rest(None, None, None)
    limit, by_limit = None, paid.limit()
    if by_limit is not None and by_limit[1] < left_s:
        limit, left_s, from_usd = by_limit[0], max(0.0, by_limit[1]), paid.usd
    usd = None
    if paid.usd is not None and from_usd is not None and paid.usd_per_s is not None:
        usd = max(paid.usd, from_usd + paid.usd_per_s * left_s)
    return _Rest(left_s, usd, limit)


def _num_ranks(line: dict[str, Any]) -> int | None:
    """The ranks that a line of metrics is of; None where it does not tell."""
    whole, each = line.get("perf/tokens_per_sec"), line.get("perf/tokens_per_sec_per_gpu")
    return round(whole / each) if whole and each else None


def _usual(recent: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the newest steps, of what varies from step to step."""
    values = {name: [line[name] for line in recent if name in line] for name in median_names()}
    return {name: statistics.median(found) for name, found in values.items() if found}


def _spent(run: RunDir, status: Status) -> Breakdown | None:
    """Where the time went until now, or until the run's end; None where its files do not tell."""
    with suppress(LauncherError, OSError, KeyError, TypeError, ValueError):
        return goodput.read(run, time.time(), status.state) if run_store.attempt_numbers(run) else None
    return None


def _goodput(told: Breakdown | None) -> dict[str, float] | None:
    """The time since submission and its parts in seconds; None before there is any."""
    if told is None or not told.kept_s:
        return None
    lost = {name: getattr(told, name) for name in goodput.LOST}
    return {"fraction": told.goodput, "wall_s": told.wall_s, "kept_s": told.kept_s, **lost, "lost_steps": told.lost_steps}


def _cost(
    seen: MetricsTail, spent: Breakdown | None, placed: Placement | None, expected_usd: float | None
) -> dict[str, Any] | None:
    """GPU hours and dollars so far, and the dollars at the end where that can be told; None where nothing is counted.

    Where the files of the attempts do not tell, the newest line of metrics that counts does. `at_typical_price` is None without a
    plan.
    """
    counted, price = seen.spent, None if placed is None else placed.price
    typical = None if placed is None else price is not None and price.assumption is not None
    if spent is not None and spent.gpu_s and placed is not None:
        if placed.device == "cpu" and price is None:
            return None
        hours, usd, typical = spent.gpu_s / 3600, spent.usd, spent.assumed_usd > 0
    elif counted is not None:
        hours, usd = counted.gpu_hours, counted.usd
    else:
        return None
    return {"gpu_hours": hours, "usd": usd, "expected_usd": expected_usd, "at_typical_price": typical}
