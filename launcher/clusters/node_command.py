"""A command that runs something on nodes: reads its output as it arrives, enforces a deadline, and always ends it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self

from launcher.errors import printable

_END_S = 20.0
_MAX_LINES = 200
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class NodeCommand:
    """A running command in its own session, so that Ctrl-C reaches only the command that started it; a context that ends it.

    Attributes:
        errors: the last lines of its standard error.
    """

    def __init__(self, command: Sequence[str], stdin: str, environ: Mapping[str, str]) -> None:
        self.errors: deque[str] = deque(maxlen=_MAX_LINES)
        with tempfile.TemporaryFile("w+") as file:
            file.write(stdin)
            file.seek(0)
            self._process = subprocess.Popen(
                command,
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=dict(environ),
                start_new_session=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        output, errors = self._process.stdout, self._process.stderr
        assert output is not None
        assert errors is not None

        def read_lines() -> None:
            for line in output:
                self._lines.put(line)
            self._lines.put(None)

        threading.Thread(target=read_lines, daemon=True).start()
        self._errors_thread = threading.Thread(target=self.errors.extend, args=(errors,), daemon=True)
        self._errors_thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            self.close()

    def show_lines(self, show: Callable[[str], object], deadline: float) -> list[str]:
        """Pass the lines of its standard output to `show` until it closes it, or until `deadline`; returns the last lines."""
        last: deque[str] = deque(maxlen=_MAX_LINES)
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                # Leave time for the messages that explain the end.
                self._errors_thread.join(1.0)
                break
            show(line)
            last.append(line.strip())
        return [line for line in last if line]

    def close(self) -> None:
        """End the command and everything that it started; TERM comes first, so that it can clean up."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
                return


def show_line(line: str) -> None:
    """Print a line of a command to standard error."""
    print(printable(line.rstrip()), file=sys.stderr, flush=True)


@contextmanager
def blocked_signals(*numbers: signal.Signals) -> Iterator[None]:
    """Block signals in this thread, and in the processes that it starts: they stay pending."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C, TERM and HUP during a cleanup that must complete; the first one takes effect at the end."""
    if threading.current_thread() is not threading.main_thread():
        # Python runs handlers only in the main thread.
        yield
        return
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    # Use handlers, not a mask: the kernel delivers a signal that the main thread blocks to another thread, and Python still runs
    # the handler in the main thread.
    before = {number: signal.signal(number, note) for number in _INTERRUPTS if signal.getsignal(number) is not None}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
