"""Slurm's own commands, run with a deadline; what they refuse is shown word for word."""

from __future__ import annotations

import shutil
import subprocess

from launcher.errors import RunError

DEADLINE_S = 30.0


class SlurmError(RunError):
    """A command of Slurm failed or did not answer; the problem's value holds what it said."""


def slurm(*argv: str, deadline_s: float = DEADLINE_S) -> str:
    """Run `argv`, a command of Slurm, and return what it printed.

    Raises:
        SlurmError: where the command is missing, fails, or does not answer within the deadline.
    """
    name = argv[0]
    if shutil.which(name) is None:
        raise SlurmError(f"{name} is not on this machine", where=name, remedy="run this where Slurm's commands are: a login node")
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=deadline_s)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{name} did not answer within {deadline_s:.0f} s", where=" ".join(argv)) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise SlurmError(f"{name} refused", where=" ".join(argv), value=said)
    return done.stdout
