"""A process that works beside the ranks on the head node: the handle of its agent, and what all such processes share.

It has lower priority than the ranks, gets orders on its standard input, one a line, and ends with the thread that has started it.
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

# The ranks have priority on the processor.
_NICE = 10
_POLL_S = 0.1


class Sidecar(ABC):
    """The agent's handle of the process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def _start(
        cls, module: str, plan_path: str, run: RunDir, attempt: int, log_name: str, environment: Mapping[str, str] | None
    ) -> Self:
        """Start `python -m module PLAN ATTEMPT` with its output in a file of the attempt."""
        command = [sys.executable, "-m", module, plan_path, str(attempt)]
        with open(run.attempt(attempt) / log_name, "ab") as log:
            return cls(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT))

    @property
    def pid(self) -> int:
        return self._process.pid

    @abstractmethod
    def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
        """Let the process complete its work, and end it at `until` at the latest, or as soon as `unwanted` returns True.

        `until` is in seconds since the epoch, and may be infinite.
        """

    def _send(self, order: str) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        # The process may have ended.
        with suppress(OSError):
            stdin.write(f"{order}\n".encode())
            stdin.flush()

    def _wait(self, until: float, unwanted: Callable[[], bool]) -> None:
        """Wait until the process has ended, the time is `until`, or `unwanted` returns True."""
        while self._process.poll() is None and time.time() < until and not unwanted():
            time.sleep(_POLL_S)

    def _end(self, order: str, seconds: float, unwanted: Callable[[], bool]) -> None:
        """Send the order to end, and kill the process where it does not end within `seconds`.

        `unwanted` is called meanwhile: on Ray, the question is the worker's sign of life.
        """
        self._send(order)
        end_by = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < end_by:
            unwanted()
            time.sleep(_POLL_S)
        if self._process.poll() is None:
            # What it has started ends with it.
            self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()


def begin_sidecar() -> io.FileIO:
    """Make this process a sidecar; returns its standard input, with the agent's orders."""
    die_with_parent()
    os.nice(_NICE)
    # Signals to save and stop are for the ranks; the agent tells this process the end through standard input.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP})
    # Unbuffered: the lock of a buffer would still be held when the interpreter ends.
    return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)


def record_event(run: RunDir, attempt: int, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
    """Print an event for the log and append it to the run's events, as far as its disk has room."""
    print(text, file=sys.stderr, flush=True)
    try:
        append_event(run, attempt, kind, text, step, **fields)
    except OSError as error:
        print(f"events.jsonl cannot be written: {error}", file=sys.stderr, flush=True)


def checkpoints_state(folder: Path) -> object:
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
