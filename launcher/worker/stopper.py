"""Forwards a node agent's signals to its ranks: save and stop, then SIGKILL after the grace period."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping

from launcher.worker.sidecars.sidecar import Sidecar
from launcher.worker.signals import CANCEL

_RESEND_S = 0.5


class Stopper:
    """The first signal asks the ranks to save and stop; a person's second signal, or the end of the grace period, kills them.

    `signals` maps the agent's signals to the ranks' signals. At `kill_at`, a time.monotonic() time, ranks that were asked to
    stop are killed in any case. The signal is repeated until `disarm`, because ranks may still be starting; a rank that has
    received it ignores repetitions. `requested` is whether a stop was requested, `killed` whether the ranks were killed after it.
    """

    def __init__(
        self, grace_s: float, signals: Mapping[signal.Signals, signal.Signals], signal_ranks: Callable[[int], None]
    ) -> None:
        self._grace_s = grace_s
        self._signals = signals
        self._signal_ranks = signal_ranks
        self._signal: int | None = None
        self._disarmed = threading.Event()
        self._cancelled = False
        self._requested_at: float | None = None
        self._num_cancels = 0
        self.kill_at: float | None = None
        self.requested = False
        self.killed = False

    def install(self) -> Stopper:
        """Listen in a thread: signal handlers would have to wait while the main thread is inside a rendezvous.

        The main thread blocks the signals, and so do the ranks from their first instruction on: a signal that arrives during
        their imports stays pending until they listen.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, set(self._signals))
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def disarm(self) -> None:
        """Stop sending signals."""
        self._disarmed.set()

    def finish(self, sidecar: Sidecar | None, deadline_s: float = math.inf, *, uses_grace: bool = True) -> None:
        """Wait for a sidecar for the rest of the grace period, for at most `deadline_s`, or until a person cancels again.

        If no stop was requested, there is no grace period: the upload of the last checkpoint, for example, may take as long as it
        needs. Without `uses_grace`, the wait ends at the first stop request.
        """
        if sidecar is None:
            return
        now, num_cancels = time.monotonic(), self._num_cancels
        stop_by = math.inf if self._requested_at is None else self._requested_at + self._grace_s
        until = min(stop_by, self.kill_at or math.inf, now + deadline_s)

        def unwanted() -> bool:
            if not uses_grace and self.requested:
                return True
            is_late = self._requested_at is not None and time.monotonic() > self._requested_at + self._grace_s
            return is_late or self._num_cancels > num_cancels

        sidecar.finish(now if self.killed else until, unwanted)

    def request(self, stop_signal: signal.Signals) -> None:
        """Ask the ranks to save and stop, unless they were asked before."""
        if not self.requested:
            self._signal, self.requested, self._requested_at = stop_signal, True, time.monotonic()
            threading.Thread(target=self._repeat, name="stopper", daemon=True).start()

    def _listen(self) -> None:
        while True:
            stop_signal = self._signals[signal.Signals(signal.sigwaitinfo(set(self._signals)).si_signo)]
            if self._cancelled and stop_signal == CANCEL:
                self._signal, self.killed = signal.SIGKILL, True
            self._cancelled = self._cancelled or stop_signal == CANCEL
            self._num_cancels += stop_signal == CANCEL
            self.request(stop_signal)

    def _repeat(self) -> None:
        deadline = time.monotonic() + self._grace_s
        while not self._disarmed.is_set():
            if time.monotonic() > deadline or (self.kill_at is not None and time.monotonic() > self.kill_at):
                self._signal, self.killed = signal.SIGKILL, True
            if self._signal is not None:
                self._signal_ranks(self._signal)
            self._disarmed.wait(_RESEND_S)
