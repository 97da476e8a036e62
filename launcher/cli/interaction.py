"""The person at a running command: Ctrl-C and other signals, which leave nothing behind silently, and answers to questions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

from launcher.errors import printable

_MAX_COLLECTED = 2
_ALIVE_S = 10.0


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make TERM and HUP end the command like Ctrl-C, so that it cancels its allocation and ends its processes."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def alive_file(path: Path) -> Iterator[None]:
    """Increment a counter in a file every few seconds: processes on other machines end themselves if this command is killed."""
    ended = threading.Event()

    def count() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            with suppress(OSError):
                path.write_text(f"{number}\n")
            ended.wait(_ALIVE_S)

    thread = threading.Thread(target=count, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            path.unlink()


class Interrupts:
    """Ctrl-C ends the command until `defer` is called. After that, INT and TERM are collected in `received`.

    A third signal ends the command.
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
        """Collect signals from now on."""
        if not self._before:
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if len(self.received) > _MAX_COLLECTED:
            raise KeyboardInterrupt


def read_yes(question: str) -> bool:
    """Ask on the terminal; no answer means no."""
    try:
        return input(f"{printable(question)} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
