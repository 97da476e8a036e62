"""Signals to save and stop: in a rank they set a flag, and all ranks act on it together at the end of a training step.

A node's agent forwards its signals to its ranks, and kills them after the grace period.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.worker.sidecars.sidecar import Sidecar

# USR1: a person asks to stop (cancel, Ctrl-C). USR2 and TERM: the machines are about to be taken back.
CANCEL = signal.SIGUSR1
PREEMPT = signal.SIGUSR2
_REASONS = {CANCEL: "cancelled", PREEMPT: "preempted", signal.SIGTERM: "preempted"}
# The exit code of a rank that the agent ends because another rank failed; it says nothing about the cause.
DISMISSED = 128 + signal.SIGTERM
_RESEND_S = 0.5


class StopFlag:
    """A callable that returns the first reason to stop, or None; `at` is that signal's time.monotonic() time.

    A thread waits for the signals, because Python runs handlers only in the main thread, and not while it is inside a collective.
    With `loading`, a cancel before `begin_training` ends the process at once: there is nothing to save yet.
    """

    def __init__(self, loading: bool = False) -> None:
        self.at: float | None = None
        self._reason: str | None = None
        self._loading = loading

    def __call__(self) -> str | None:
        return self._reason

    def cancel(self) -> None:
        self._request("cancelled")

    def begin_training(self) -> None:
        """From here on, a cancel sets the flag."""
        self._loading = False

    def install(self) -> StopFlag:
        """Start listening; call it from the main thread before any other thread exists."""
        # Every later thread and process inherits the blocked signals, so helpers survive the USR2 and TERM that Slurm sends to
        # all processes of a step. wandb-core survives only USR2, because it unblocks TERM.
        signal.pthread_sigmask(signal.SIG_BLOCK, _REASONS)
        # Ctrl-C reaches the terminal's whole process group; the command that follows the run decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._listen, args=(os.getppid(),), name="signals", daemon=True).start()
        return self

    def _listen(self, agent_pid: int) -> None:
        while True:
            received = signal.sigwaitinfo(_REASONS)
            if received.si_signo == signal.SIGTERM and received.si_pid == agent_pid:
                # torch's elastic agent stops all ranks after one has failed: a collective would never complete without that rank.
                # Flushing could block and is not needed: the agent starts ranks with unbuffered output.
                os._exit(DISMISSED)
            if received.si_signo == CANCEL and self._loading:
                # The agent sends the signal to all ranks, so none waits for another. Waiting for the end of a phase could take
                # minutes.
                os.write(2, b"cancelled while loading; nothing was trained\n")
                os._exit(0)
            self._request(_REASONS[signal.Signals(received.si_signo)])

    def _request(self, reason: str) -> None:
        if self._reason is None:
            self.at = time.monotonic()
            self._reason = reason


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
        self._signals, self._signal_ranks = signals, signal_ranks
        self._signal: int | None = None
        self._disarmed = threading.Event()
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
        if self.requested:
            return
        self._signal, self.requested, self._requested_at = stop_signal, True, time.monotonic()

        def repeat_signal() -> None:
            deadline = time.monotonic() + self._grace_s
            while not self._disarmed.is_set():
                if time.monotonic() > deadline or (self.kill_at is not None and time.monotonic() > self.kill_at):
                    self._signal, self.killed = signal.SIGKILL, True
                if self._signal is not None:
                    self._signal_ranks(self._signal)
                self._disarmed.wait(_RESEND_S)

        threading.Thread(target=repeat_signal, name="stopper", daemon=True).start()

    def cancel(self, save: bool) -> None:
        """Follow a person's request, which may be repeated: the ranks save first, or are killed."""
        while self._num_cancels < (1 if save else 2):
            self._add_cancel()

    def _add_cancel(self) -> None:
        self._num_cancels += 1
        self.request(CANCEL)
        if self._num_cancels > 1:
            self._signal, self.killed = signal.SIGKILL, True

    def _listen(self) -> None:
        while True:
            stop_signal = self._signals[signal.Signals(signal.sigwaitinfo(set(self._signals)).si_signo)]
            if stop_signal == CANCEL:
                self._add_cancel()
            else:
                self.request(stop_signal)
