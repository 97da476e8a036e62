"""What a check looks at, and separate Python processes for checks whose imports may crash or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.config.schema import RunConfig
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir


@dataclass(frozen=True)
class CheckedNode:
    """A machine and what it shall train: `device` is cuda or cpu, with `num_ranks` ranks.

    `plan` and `attempt` are those of the run that is about to start; None and 0 if the settings are checked without a run.
    """

    config: RunConfig
    device: str
    num_ranks: int
    plan: LaunchPlan | None = None
    attempt: int = 0

    @property
    def run(self) -> RunDir:
        """The run that is about to start."""
        assert self.plan is not None
        return RunDir(Path(self.plan.run_dir))


def run_python(arguments: Sequence[str], deadline_s: float, environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Run `python ARGUMENTS`; returns the last line of its output, and why it failed, empty if it did not.

    It imports nothing from the working directory, has a temporary folder of its own, because other users can put compiled code
    into the shared one, and is killed with its children at the deadline.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-doctor-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**environ, "TMPDIR": folder},
        )
        try:
            output, errors = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            kill_children(process.pid)
            process.kill()
            return "", f"it did not end within {deadline_s:.0f} s"
    if process.returncode < 0:
        return "", f"it was killed by {signal.Signals(-process.returncode).name}"
    if process.returncode:
        return "", ([f"exit code {process.returncode}", *filter(str.strip, errors.splitlines())])[-1].strip()
    return (["", *output.strip().splitlines()])[-1], ""


def kill_children(pid: int) -> None:
    """Kill all processes that a process started, without waiting: one that hangs in the kernel does not end."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
