"""Where metrics and messages go: one protocol, a composite of its implementations, and their start."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from launcher.errors import LauncherError, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.console import ConsoleTracker
from launcher.tracking.jsonl import JsonlTracker
from launcher.tracking.wandb.tracker import WandbTracker

logger = logging.getLogger(__name__)

# How long an alert that lasts is held back before it is sent again.
REPEAT_S = 1800.0


class Tracker(Protocol):
    """A sink for what a run has to say. Steps count optimizer steps; metric names are those of the design."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one step; several calls for one step add up."""

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        """Record a message for people; `kind` is info, eval, sample, checkpoint, alert or the like. An alert that may come again
        begins with what it is of, and a colon.

        What a kind has to say to programs stands in fields: a checkpoint's `path`, `saved_step` and `eval_loss`, an export's
        `path`. With the field `recorded` it stands in events.jsonl already, and is only passed on.
        """

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record what describes the run as a whole, such as its last and best loss."""

    def finish(self, state: str) -> None:
        """Write out what is pending and close; `state` is the run's last state, such as completed or failed.

        SUPERSEDED writes nothing more: another attempt has taken over, and what this one says is not of the run.
        """


class RateLimit:
    """Lets one alert of a kind through in REPEAT_S seconds, whichever thread it comes from.

    The kind of an alert is its text before the first colon: "status.json could not be written: no space left".
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._sent_at: dict[str, float] = {}

    def admit(self, text: str) -> bool:
        """Return whether to send this alert, and count it as sent if so."""
        kind, now = text.partition(":")[0], self._clock()
        with self._lock:
            is_due = now - self._sent_at.get(kind, -math.inf) >= REPEAT_S
            if is_due:
                self._sent_at[kind] = now
        return is_due


class Composite:
    """Fans out to several trackers and never raises: one that fails is reported once, through the others, and dropped.

    One that raises an OSError stays, as storage may be back at the next call. Of alerts of a kind, few are passed on.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        self._reported: list[Tracker] = []
        self._limit = RateLimit()

    def add(self, tracker: Tracker) -> None:
        self._trackers.append(tracker)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        if kind == "alert" and not self._limit.admit(text):
            return
        # The last started first: Weights & Biases only takes note of it, and is heard where storage hangs at the files of others.
        self._each(lambda tracker: tracker.event(kind, text, step, **fields), reversed(self._trackers))

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

    def _each(self, call: Callable[[Tracker], None], trackers: Iterable[Tracker] | None = None) -> None:
        failed: list[tuple[Tracker, Exception]] = []
        for tracker in self._trackers if trackers is None else trackers:
            try:
                call(tracker)
            except Exception as error:
                failed.append((tracker, error))
        # All that failed leave before any is reported: a report must not go to a broken one.
        lasting = [tracker for tracker, error in failed if not isinstance(error, OSError)]
        self._trackers = [t for t in self._trackers if all(t is not tracker for tracker in lasting)]
        for broken, reason in failed:
            self._report(broken, reason)

    def _report(self, tracker: Tracker, error: Exception) -> None:
        stays = any(tracker is each for each in self._trackers)
        if any(tracker is each for each in self._reported) and stays:
            return
        self._reported.append(tracker)
        detail = str(error) if isinstance(error, LauncherError) else f"{type(error).__name__}: {error}"
        then = "is tried again with what comes" if stays else "is off for the rest of the run"
        text = f"{type(tracker).__name__} failed and {then}; training goes on. {detail}"
        if any(each is not tracker for each in self._trackers):
            self.event("alert", text)
        else:
            logger.warning(text)


def start_trackers(plan: LaunchPlan, run_dir: str | Path, attempt: int, on_stop: Callable[[], None]) -> Composite:
    """Start the terminal's lines, metrics.jsonl, events.jsonl and, where the plan says so, Weights & Biases.

    Called on rank 0 only. `attempt` counts from 1. `on_stop` is called, in another thread, where a person presses Stop in W&B's
    page. Weights & Biases that refuses to start is no reason to lose the machines: training goes on, and its data stay on disk.

    Raises:
        RunError: where the run directory cannot be written.
    """
    composite = Composite([ConsoleTracker(plan.batch.max_steps)])
    run = RunDir(Path(run_dir))
    tracking = plan.config.tracking
    try:
        composite.add(JsonlTracker(run, attempt))
    except OSError as error:
        raise RunError(
            f"metrics.jsonl cannot be written: {error.strerror}",
            where=str(run_dir),
            remedy="free space, or make the folder writable",
        ) from error
    if tracking.kind == "wandb" and tracking.mode != "disabled":
        composite.add(WandbTracker(plan, run_dir, tell=composite.event, on_stop=on_stop))
    return composite
