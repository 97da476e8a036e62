"""A process beside the ranks on the head node: the agent's handle for it, and code that all such processes share.

It has lower priority than the ranks, reads orders from standard input, one per line, and ends with the thread that started it.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from launcher.checkpoint.manifest import LATER_EVALUATION, MANIFEST
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import append_event
from launcher.worker.ranks.rank_env import die_with_parent

# The ranks take precedence on the CPU.
_NICE = 10
_POLL_S = 0.1


class Sidecar(ABC):
    """The agent's handle for the process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def _start(
        cls, module: str, plan_path: str, run: RunDir, attempt: int, log_name: str, environment: Mapping[str, str] | None
    ) -> Self:
        """Start `python -m module PLAN ATTEMPT`, with its output in a file in the attempt's folder."""
        command = [sys.executable, "-m", module, plan_path, str(attempt)]
        with open(run.attempt(attempt) / log_name, "ab") as log:
            return cls(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT))

    @property
    def pid(self) -> int:
        return self._process.pid

    @abstractmethod
    def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
        """Wait for the process to complete its work; end it at `until`, or as soon as `unwanted` returns True.

        `until` is a time.monotonic() time and may be infinite.
        """

    def _send(self, order: str) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        # The process may have ended.
        with suppress(OSError):
            stdin.write(f"{order}\n".encode())
            stdin.flush()

    def _wait(self, until: float, unwanted: Callable[[], bool]) -> None:
        """Wait until the process has ended, `until` has passed, or `unwanted` returns True."""
        while self._process.poll() is None and time.monotonic() < until and not unwanted():
            time.sleep(_POLL_S)

    def _end(self, order: str, seconds: float, unwanted: Callable[[], bool]) -> None:
        """Send the order to end, and kill the process if it does not end within `seconds`.

        `unwanted` is called meanwhile: on Ray, this call is also the worker's heartbeat.
        """
        self._send(order)
        end_by = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < end_by:
            unwanted()
            time.sleep(_POLL_S)
        if self._process.poll() is None:
            # The processes that it started end with it.
            self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()


def begin_sidecar() -> io.FileIO:
    """Make this process a sidecar; returns its standard input, which carries the agent's orders."""
    die_with_parent()
    os.nice(_NICE)
    # Signals to save and stop are for the ranks; this process learns of the end through standard input.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP})
    # Unbuffered: otherwise the buffer's lock would still be held when the interpreter exits.
    return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)


def record_event(run: RunDir, attempt: int, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
    """Print an event for the log and append it to the run's events if its disk has room."""
    print_to_log(text)
    try:
        append_event(run, attempt, kind, text, step, **fields)
    except OSError as error:
        print_to_log(f"events.jsonl cannot be written: {error}")


def print_to_log(text: str) -> None:
    """Print a line to this process's log. A full disk, which the log shares with the run, must not end the process."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def checkpoints_state(folder: Path) -> list[tuple[str, str, int]]:
    """Return a value that changes when a checkpoint comes or goes, or is evaluated after its save.

    It is cheap enough for frequent calls on a network file system.
    """
    files = []
    with suppress(OSError):
        for path in folder.glob("step-*"):
            for name in (MANIFEST, LATER_EVALUATION):
                with suppress(OSError):
                    files.append((path.name, name, (path / name).stat().st_mtime_ns))
    return sorted(files)
