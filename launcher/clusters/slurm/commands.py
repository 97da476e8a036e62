"""Slurm's own commands, run with a deadline; what they refuse is shown word for word."""

from __future__ import annotations

import os
import shutil
import subprocess

from launcher.errors import RunError

DEADLINE_S = 30.0
# With these a person's shell shapes, sorts and filters what Slurm's commands print.
_DISPLAY = ("SQUEUE_", "SACCT_", "SACCTMGR_", "SINFO_", "SCONTROL_")


class SlurmError(RunError):
    """A command of Slurm failed or did not answer; the problem's value holds what it said."""


def slurm(*argv: str, deadline_s: float = DEADLINE_S) -> str:
    """Run `argv`, a command of Slurm, and return what it printed, with times in seconds since the epoch.

    Raises:
        SlurmError: where the command is missing, fails, or does not answer within the deadline.
    """
    name = argv[0]
    if shutil.which(name) is None:
        raise SlurmError(f"{name} is not on this machine", where=name, remedy="run this where Slurm's commands are: a login node")
    env = {key: value for key, value in os.environ.items() if not key.startswith(_DISPLAY)} | {"SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=env, timeout=deadline_s
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{name} did not answer within {deadline_s:.0f} s", where=" ".join(argv)) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise SlurmError(f"{name} refused", where=" ".join(argv), value=said)
    return done.stdout
