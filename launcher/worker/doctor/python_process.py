"""A separate Python process with a deadline: its imports may crash or hang it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from launcher.security.folders import closed_umask
from launcher.security.library_caches import find_usable_caches

# Processes that have not been waited for. Each has its own session, so it does not end with this process.
_running: set[subprocess.Popen[str]] = set()


@dataclass(frozen=True)
class Finished:
    """How a process ended; `reason` says in one line why it failed, and is empty if it did not."""

    output: str
    reason: str


def run_python(arguments: Sequence[str], deadline_s: float, environ: Mapping[str, str] = os.environ) -> Finished:
    """Run `python ARGUMENTS` in its own session; the whole session is killed at the deadline."""
    return wait_for(start_python(arguments, environ), deadline_s)


def start_python(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> subprocess.Popen[str]:
    """Start `python ARGUMENTS` with its output in pipes; it imports nothing from the working directory."""
    process = subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # Kernels that a check compiles are loaded from this user's folders; the check of the caches names others.
        env={**environ, **find_usable_caches(environ, alert=lambda text: None)},
        umask=closed_umask(),
        start_new_session=True,
    )
    _running.add(process)
    return process


def wait_for(process: subprocess.Popen[str], deadline_s: float) -> Finished:
    """Wait for a process to end, or kill it at the deadline."""
    try:
        output, errors = process.communicate(timeout=max(0.1, deadline_s))
    except subprocess.TimeoutExpired:
        kill(process)
        return Finished("", f"did not end within {deadline_s:.0f} s")
    _running.discard(process)
    if process.returncode < 0:
        return Finished(output, f"was killed by {signal.Signals(-process.returncode).name}")
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    return Finished(output, (last or f"exit code {process.returncode}") if process.returncode else "")


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children without waiting: one that hangs in the kernel does not end."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    _running.discard(process)


def kill_all() -> None:
    """Kill every process that has not been waited for."""
    for process in [*_running]:
        kill(process)
