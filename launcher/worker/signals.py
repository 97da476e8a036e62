"""Signals set a flag; all ranks act on it together at the end of a training step."""

from __future__ import annotations

import os
import signal
import threading
import time

# USR1: a person asks to stop (cancel, Ctrl-C). USR2 and TERM: the machines are about to be taken back.
CANCEL = signal.SIGUSR1
PREEMPT = signal.SIGUSR2
_REASONS = {CANCEL: "cancelled", PREEMPT: "preempted", signal.SIGTERM: "preempted"}
# The exit code of a rank that the agent ends because another rank failed; it says nothing about the cause.
DISMISSED = 128 + signal.SIGTERM


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
