"""Progress of work that a user waits for: one live line on a terminal, plain lines at growing intervals in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TextIO

from launcher.plan.quantities import format_size
from launcher.security.redaction import raw
from launcher.tracking.metrics import format_duration

Say = Callable[[str], None]
# A function that counts further bytes of an activity, and a function that makes one for an activity and its total.
Advance = Callable[[int], None]
MakeProgress = Callable[[str, int], Advance]
# The kind of progress events in a run.
EVENT = "progress"
# Work that ends before the first line is due gets no line. An hour of work gives about 25 lines.
_FIRST_S, _GROWTH, _LONGEST_S = 5.0, 0.25, 300.0
_LIVE_S = 0.1
_PACED_ITEMS, _PACED_SHARE = 10, 0.01


def time_left(done: int, total: int, elapsed_s: float) -> str:
    """Return the remaining time as it is appended to a progress line, such as `, 1m40s left`; empty if unknown.

    The first few of many items say nothing about the pace, because their time is that of the start.
    """
    is_known = 0 < done < total and elapsed_s >= 1 and (done >= _PACED_ITEMS or done >= _PACED_SHARE * total)
    return f", {format_duration(elapsed_s * (total - done) / done)} left" if is_known else ""


class Pace:
    """Decides when the next line is due: at growing intervals of at least `first_s` and at most `longest_s`."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, first_s: float = _FIRST_S, longest_s: float = _LONGEST_S
    ) -> None:
        self._clock, self._first_s, self._longest_s = clock, first_s, longest_s
        self._began = self._last = clock()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began

    def is_due(self) -> bool:
        """Return whether a line is due; if so, count it as written."""
        now = self._clock()
        is_due = now - self._last >= min(self._longest_s, max(self._first_s, (now - self._began) * _GROWTH))
        if is_due:
            self._last = now
        return is_due


class ProgressCounter:
    """Counts what is done of an activity, from any thread, and reports progress when a line is due.

    `total` is an upper bound, 0 if unknown; `show` formats numbers, by default of bytes.
    """

    def __init__(
        self, activity: str, total: int, say: Say, pace: Pace | None = None, show: Callable[[int], str] = format_size
    ) -> None:
        self._activity, self._total, self._say, self._pace, self._show = activity, total, say, pace or Pace(), show
        self._lock = threading.Lock()
        self._done = 0

    def advance(self, number: int) -> None:
        """Count further bytes or items."""
        with self._lock:
            self._done += number
            if not self._pace.is_due():
                return
            text = self.describe()
        self._say(text)

    def describe(self) -> str:
        """Return a line such as `exporting: 3.10 GiB of 15.20 GiB (20%), 1m40s left`."""
        if not self._total:
            return f"{self._activity}: {self._show(self._done)}"
        done = min(self._done, self._total)
        left = time_left(done, self._total, self._pace.elapsed_s)
        return f"{self._activity}: {self._show(done)} of {self._show(self._total)} ({done / self._total:.0%}){left}"


@contextmanager
def live_line(stream: TextIO | None = None) -> Iterator[tuple[Say, Callable[[], Pace]]]:
    """Yield a function that shows a line, and one that makes the pace for it.

    On a terminal the line is live and disappears at the end. Elsewhere, each is a separate line.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        yield lambda text: print(text, file=stream, flush=True), Pace
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live("", console=Console(file=raw(stream)), refresh_per_second=8, transient=True) as live:
        yield (
            lambda text: live.update(Text(text, overflow="ellipsis", no_wrap=True)),
            partial(Pace, first_s=0.0, longest_s=_LIVE_S),
        )


def ignore_progress(activity: str, total: int) -> Advance:
    """Return a function that counts nothing."""
    return lambda num_bytes: None


def as_events(event: Callable[[str, str], None]) -> MakeProgress:
    """Return a function that reports progress as events of a run, through a tracker's `event(kind, text)`."""
    return lambda activity, total: ProgressCounter(activity, total, lambda text: event(EVENT, text)).advance


@contextmanager
def show_progress() -> Iterator[MakeProgress]:
    """Show the progress of consecutive activities on standard error."""
    with live_line() as (say, make_pace):
        yield lambda activity, total: ProgressCounter(activity, total, say, make_pace()).advance


@contextmanager
def show_waiting(activity: str) -> Iterator[None]:
    """Show on standard error how long something that reports no progress has been working."""
    with live_line() as (say, make_pace), report_elapsed_time(activity, say, make_pace()):
        yield


@contextmanager
def show_documents(noun: str = "documents") -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of a data build's stages on standard error; yields a function of stage, documents done, and total.

    `noun` names what is counted. Until the first count is shown, it shows how long the preparation has been working.
    """
    with live_line() as (say, make_pace), ExitStack() as preparation:
        preparation.enter_context(report_elapsed_time("preparing", say, make_pace()))
        paces: dict[str, Pace] = {}
        first_counts: dict[str, int] = {}
        ended: set[str] = set()

        def show(stage: str, done: int, total: int) -> None:
            is_due = paces.setdefault(stage, make_pace()).is_due()
            # A stage may continue where an earlier process stopped.
            first = first_counts.setdefault(stage, done)
            # The end of a stage gets one line in the log.
            if total > 1 and stage not in ended and (done == total or is_due):
                if done == total:
                    ended.add(stage)
                left = time_left(done - first, total - first, paces[stage].elapsed_s)
                preparation.close()
                say(f"{stage}: {done:,} of {total:,} {noun}{left}")

        yield show


@contextmanager
def report_elapsed_time(activity: str, say: Say, pace: Pace) -> Iterator[None]:
    """Report how long something that reports no progress has been working."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LIVE_S):
            if pace.is_due():
                say(f"{activity}: {format_duration(pace.elapsed_s)} so far")

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
