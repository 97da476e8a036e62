"""Signals set a flag; the training loop acts on it at the end of a step, on all ranks together."""

from __future__ import annotations

import signal
from types import FrameType

# USR1: a person asks to stop (cancel, Ctrl-C). USR2 and TERM: the machines are about to go.
CANCEL = signal.SIGUSR1
PREEMPT = signal.SIGUSR2
_REASONS = {CANCEL: "cancelled", PREEMPT: "preempted", signal.SIGTERM: "preempted"}


class StopFlag:
    """Callable that tells the first reason to stop, or None."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def __call__(self) -> str | None:
        return self._reason

    def install(self) -> StopFlag:
        for number in _REASONS:
            signal.signal(number, self._set)
        # Ctrl-C reaches the whole terminal group; the command that follows the run decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return self

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or _REASONS[signal.Signals(number)]
