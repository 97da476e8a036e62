"""Signals that a node's agent gets, passed on to its ranks: save and stop, then, when the grace period is over, SIGKILL."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping

from launcher.worker.mirror_process import MirrorProcess
from launcher.worker.signals import CANCEL

_RESEND_S = 0.5


class Stopper:
    """First signal: ask the ranks to save and stop. A person's second, or the grace running out: kill them.

    At `kill_at`, in seconds since the epoch, ranks that have been asked and have not stopped are killed in any case.

    The wish is repeated until it is taken back, because ranks may still be starting when it comes; a rank that has
    heard it ignores the repetition.
    """

    def __init__(
        self, grace_s: float, signals: Mapping[signal.Signals, signal.Signals], signal_ranks: Callable[[int], None]
    ) -> None:
        self._grace_s = grace_s
        self._signals = signals
        self._signal_ranks = signal_ranks
        self._wish: int | None = None
        self._ended = threading.Event()
        self._cancelled = False
        self._asked_at: float | None = None
        self._times_cancelled = 0
        self.kill_at: float | None = None
        self.requested = False
        self.killed = False

    def install(self) -> Stopper:
        """Listen in a thread: handlers would wait while the main thread is inside a rendezvous.

        Blocked in the main thread, the signals are blocked in the ranks from their first instruction on: what comes while
        they import waits until they listen.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, set(self._signals))
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def disarm(self) -> None:
        self._ended.set()

    def finish(self, mirror: MirrorProcess | None, most_s: float = math.inf) -> None:
        """Give the mirror what is left of the time to stop in, or `most_s`; a person who asks again has waited enough.

        Where nobody has asked for the end, the last checkpoint takes the time that it needs.
        """
        if mirror is None:
            return
        now, times = time.time(), self._times_cancelled
        stop_by = math.inf if self._asked_at is None else self._asked_at + self._grace_s
        until = min(stop_by, self.kill_at or math.inf, now + most_s)

        def unwanted() -> bool:
            asked_late = self._asked_at is not None and time.time() > self._asked_at + self._grace_s
            return asked_late or self._times_cancelled > times

        mirror.finish(now if self.killed else until, unwanted)

    def request(self, wish: signal.Signals) -> None:
        """Ask the ranks to save and stop, unless they are asked already."""
        if not self.requested:
            self._wish, self.requested, self._asked_at = wish, True, time.time()
            threading.Thread(target=self._repeat, name="stopper", daemon=True).start()

    def _listen(self) -> None:
        while True:
            wish = self._signals[signal.Signals(signal.sigwaitinfo(set(self._signals)).si_signo)]
            if self._cancelled and wish == CANCEL:
                self._wish, self.killed = signal.SIGKILL, True
            self._cancelled = self._cancelled or wish == CANCEL
            self._times_cancelled += wish == CANCEL
            self.request(wish)

    def _repeat(self) -> None:
        deadline = time.monotonic() + self._grace_s
        while not self._ended.is_set():
            if time.monotonic() > deadline or (self.kill_at is not None and time.time() > self.kill_at):
                self._wish, self.killed = signal.SIGKILL, True
            if self._wish is not None:
                self._signal_ranks(self._wish)
            self._ended.wait(_RESEND_S)
