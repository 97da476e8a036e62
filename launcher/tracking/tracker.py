"""Where metrics and messages go: one protocol, a composite of its implementations, and their start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from launcher.errors import LauncherError, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.console import ConsoleTracker
from launcher.tracking.jsonl import JsonlTracker
from launcher.tracking.wandb import WandbTracker

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A sink for what a run has to say. Steps count optimizer steps; metric names are those of the design."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one step; several calls for one step add up."""

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        """Record a message for people; `kind` is info, eval, sample, checkpoint, alert or the like."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record what describes the run as a whole, such as its last and best loss."""

    def finish(self, state: str) -> None:
        """Write out what is pending and close; `state` is the run's last state, such as completed or failed."""


class Composite:
    """Fans out to several trackers and never raises: one that fails is reported once, through the others, and dropped."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        self._each(lambda tracker: tracker.event(kind, text, step, **fields))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.summary(values))

    def finish(self, state: str) -> None:
        """Close all, the last started first, so that a failure to close can still be reported by the others."""
        while self._trackers:
            tracker = self._trackers.pop()
            try:
                tracker.finish(state)
            except Exception as error:
                self._report(tracker, error)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        failed: list[tuple[Tracker, Exception]] = []
        for tracker in self._trackers:
            try:
                call(tracker)
            except Exception as error:
                failed.append((tracker, error))
        # All that failed leave before any is reported: a report must not go to a broken one.
        self._trackers = [t for t in self._trackers if all(t is not tracker for tracker, _ in failed)]
        for broken, reason in failed:
            self._report(broken, reason)

    def _report(self, tracker: Tracker, error: Exception) -> None:
        detail = str(error) if isinstance(error, LauncherError) else f"{type(error).__name__}: {error}"
        text = f"{type(tracker).__name__} failed and is off for the rest of the run; training goes on. {detail}"
        if self._trackers:
            self.event("alert", text)
        else:
            logger.warning(text)


def start_trackers(plan: LaunchPlan, run_dir: str | Path, attempt: int) -> Composite:
    """Start the terminal's lines, metrics.jsonl, events.jsonl and, where the plan says so, Weights & Biases.

    Called on rank 0 only. `attempt` counts from 1.

    Raises:
        RunError: where one of them cannot start; the ones that started before it are closed.
    """
    started: list[Tracker] = [ConsoleTracker(plan.batch.max_steps)]
    try:
        started.append(JsonlTracker(RunDir(Path(run_dir)), attempt))
    except OSError as error:
        raise RunError(
            f"metrics.jsonl cannot be written: {error.strerror}",
            where=str(run_dir),
            remedy="free space, or make the folder writable",
        ) from error
    tracking = plan.config.tracking
    if tracking.kind == "none" or tracking.mode == "disabled":
        return Composite(started)

    try:
        wandb = WandbTracker(plan, run_dir)
    except BaseException:
        Composite(started).finish("failed")
        raise
    composite = Composite([*started, wandb])
    where = f"see it at {wandb.url}" if wandb.url else f"offline; upload it with: {wandb.sync_command}"
    composite.event("info", f"Weights & Biases: {where}", url=wandb.url, sync_command=wandb.sync_command)
    return composite
