"""Ctrl-C while a command starts a run: a run that was submitted is never left behind without a word."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

_MAX_COLLECTED = 2


class Interrupts:
    """Ctrl-C ends the command until `defer` is called. After that, INT and TERM are collected in `received`.

    A third one ends the command.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def defer(self) -> None:
        """Collect the signals from now on."""
        if not self._before:
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if len(self.received) > _MAX_COLLECTED:
            raise KeyboardInterrupt
