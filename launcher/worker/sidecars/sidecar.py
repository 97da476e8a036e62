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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.checkpoint.manifest import LATER_EVALUATION, MANIFEST
from launcher.child_process import die_with_parent
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import append_event

# Orders: complete the work and end, because the attempt has ended as planned; end now.
COMPLETE, END = b"complete\n", b"end\n"
# The time to report what the mirror lacks, and the time in which an evaluation ends its own processes.
MIRROR_END_S, _ANSWERS_END_S = 5.0, 20.0
# After a failure the run soon restarts, and its next attempt continues the uploads.
AFTER_FAILURE_S = 30.0
# Seconds to submit jobs in when a run gives its nodes back.
SUBMISSION_S = 60.0
# The ranks take precedence on the CPU.
_NICE = 10
_POLL_S = 0.1


class Sidecar:
    """The agent's handle for the process, which may take `end_s` seconds to end when it is told to."""

    def __init__(self, process: subprocess.Popen[bytes], end_s: float) -> None:
        self._process, self._end_s = process, end_s

    @property
    def pid(self) -> int:
        return self._process.pid

    def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
        """Let the process complete its work, but end it at `until`, or as soon as `unwanted` returns True.

        `until` is a time.monotonic() time and may be infinite; if it has passed, the work is given up. On Ray, calls of
        `unwanted` are also the worker's heartbeats.
        """
        if time.monotonic() < until:
            self._send(COMPLETE)
        while self._process.poll() is None and time.monotonic() < until - self._end_s and not unwanted():
            time.sleep(_POLL_S)
        self._send(END)
        end_by = time.monotonic() + self._end_s
        while self._process.poll() is None and time.monotonic() < end_by:
            unwanted()
            time.sleep(_POLL_S)
        # The processes that it started end with it.
        self._process.kill()
        self._process.wait()

    def _send(self, order: bytes) -> None:
        assert self._process.stdin is not None
        # The process may have ended.
        with suppress(OSError):
            self._process.stdin.write(order)


def start_mirror(plan: LaunchPlan, plan_path: str, run: RunDir, attempt: int) -> Sidecar | None:
    """Start the process that copies checkpoints to the mirror, or return None if the plan has no mirror."""
    if plan.config.checkpoint.mirror is None:
        return None
    return Sidecar(_start_process("mirror_process", plan_path, run, attempt, "mirror.log"), MIRROR_END_S)


def start_answers(plan: LaunchPlan, plan_path: str, run: RunDir, attempt: int) -> Sidecar | None:
    """Start the process that answers prompts with the run's checkpoints, or return None if no answers are wanted."""
    if not plan.config.eval.answers_every:
        return None
    return Sidecar(_start_process("answers_process", plan_path, run, attempt, "answers.log"), _ANSWERS_END_S)


def _start_process(module: str, plan_path: str, run: RunDir, attempt: int, log_name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"launcher.worker.sidecars.{module}", plan_path, str(attempt)]
    with open(run.attempt(attempt) / log_name, "ab") as log:
        # Unbuffered: an order that the process no longer reads must not stay in the buffer.
        return subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)


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
    """Return a value that changes when a checkpoint comes or goes, or is evaluated later; cheap on a network file system."""
    files = []
    with suppress(OSError):
        for path in folder.glob("step-*"):
            for name in (MANIFEST, LATER_EVALUATION):
                with suppress(OSError):
                    files.append((path.name, name, (path / name).stat().st_mtime_ns))
    return sorted(files)
