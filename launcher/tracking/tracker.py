"""Trackers of metrics and events: the protocol, the one for the terminal, their composite, and their start."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from launcher.errors import RunError, describe, printable
from launcher.hardware import name_full_disk
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import JsonlTracker
from launcher.tracking.metrics import STEP, format_step
from launcher.tracking.wandb.tracker import WandbTracker

logger = logging.getLogger(__name__)

# Seconds before a persistent alert is sent again.
REPEAT_S = 1800.0


class Tracker(Protocol):
    """A sink of metrics and events. Steps are optimizer steps; metrics are those of launcher.tracking.metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one step; several calls for one step are merged."""

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        """Record an event; `kind` is info, eval, sample, checkpoint, alert or the like.

        The text of an alert that may repeat begins with its kind and a colon. `fields` are for programs: a checkpoint's `path`,
        `saved_step` and `eval_loss`, an export's `path`. An event with the field `recorded` is in events.jsonl already.
        """

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record values for the whole run, such as its last and lowest loss."""

    def finish(self, state: str) -> None:
        """Write what is pending and close; `state` is the run's last state, such as completed or failed.

        With SUPERSEDED nothing more is written: another attempt has taken over the run.
        """


class ConsoleTracker:
    """Prints steps and events to a stream (rank 0's log), and flushes each line."""

    def __init__(self, max_steps: int | None, stream: TextIO | None = None) -> None:
        self._max_steps = max_steps
        self._stream = stream or sys.stdout

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # Evaluations are events; without a loss, the line would be a bare step number.
        if "train/loss" in metrics:
            self._print(format_step({STEP: step, **metrics}, self._max_steps))

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        self._print(f"{kind}: {text}" if step is None else f"{kind} at step {step}: {text}")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing: the summary repeats what was printed before."""

    def finish(self, state: str) -> None:
        self._stream.flush()

    def _print(self, line: str) -> None:
        # One write, because the tracker of W&B sends events from a thread.
        print(f"{printable(line)}\n", end="", file=self._stream, flush=True)


class RateLimit:
    """Lets one alert per kind through every REPEAT_S seconds, whichever thread it comes from.

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
    """Fans out to several trackers and never raises. A tracker that fails is reported once, through the others, and removed.

    A tracker that raises an OSError stays, because storage may be back at the next call. Alerts are rate-limited by kind.
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
        # The last started comes first: W&B only queues the event, and sends it even if storage hangs for the other trackers'
        # files.
        self._each(lambda tracker: tracker.event(kind, text, step, **fields), reversed(self._trackers))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.summary(values))

    def finish(self, state: str) -> None:
        """Close all, the last started first, so that the others can report a failure to close."""
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
        # Remove all failed trackers before reporting any: a report must not go to a broken tracker.
        removed = [tracker for tracker, error in failed if not isinstance(error, OSError)]
        self._trackers = [tracker for tracker in self._trackers if tracker not in removed]
        for broken, reason in failed:
            self._report(broken, reason)

    def _report(self, tracker: Tracker, error: Exception) -> None:
        stays = tracker in self._trackers
        if stays and tracker in self._reported:
            return
        self._reported.append(tracker)
        outcome = "is retried with the next data" if stays else "is off for the rest of the run"
        text = name_full_disk(f"{type(tracker).__name__} failed and {outcome}; training continues. {describe(error)}", error)
        if self._trackers not in ([], [tracker]):
            self.event("alert", text)
        else:
            logger.warning(text)


def start_trackers(plan: LaunchPlan, run_dir: str | Path, attempt: int, on_stop: Callable[[], None]) -> Composite:
    """Start the trackers for the terminal, metrics.jsonl and events.jsonl and, if configured, Weights & Biases.

    Call it on rank 0 only. If Weights & Biases does not start, training continues, and the data stay on disk.

    Args:
        attempt: number of the attempt, from 1.
        on_stop: called in another thread when a person presses Stop on W&B's page.

    Raises:
        RunError: if the run directory cannot be written.
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
        composite.add(WandbTracker(plan, run_dir, send_event=composite.event, on_stop=on_stop))
    return composite
