"""Slurm's own commands, run with a deadline; what they refuse is shown word for word."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable

from launcher.errors import RunError

DEADLINE_S = 30.0
# Between two tries while nothing answers: soon at first, as most restarts of a controller are short.
_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 15.0
# What Slurm's commands print where no controller or database has answered them; slurm_errno.h, and the system's own words.
_SILENT = re.compile(
    r"Unable to contact slurm|Socket timed out|Connection (refused|timed out|reset)|No route to host|Network is unreachable|"
    r"Zero Bytes were transmitted|Communication connection failure|standby mode|Transport endpoint is not connected",
    re.IGNORECASE,
)
# With these a person's shell shapes, sorts and filters what Slurm's commands print.
_DISPLAY = ("SQUEUE_", "SACCT_", "SACCTMGR_", "SINFO_", "SCONTROL_")


class SlurmError(RunError):
    """A command of Slurm failed or did not answer; the problem's value holds what it said."""


class SlurmSilent(SlurmError):
    """Nothing answered; whether the command was carried out is not known."""


def slurm(*argv: str, deadline_s: float = DEADLINE_S, patience_s: float = 0.0, done: Callable[[], bool] | None = None) -> str:
    """Run `argv`, a command of Slurm, and return what it printed, with times in seconds since the epoch.

    Where nothing answers, it is tried again until `patience_s` have passed; a refusal is final. An answer may be lost
    after the command was carried out: `done`, where given, is asked before each further try, and True ends it with "".

    Raises:
        SlurmSilent: where nothing answered, each try within `deadline_s`, until the patience ended.
        SlurmError: where the command is missing or fails.
    """
    # Imported here: it takes 50 ms, which commands that ask Slurm nothing need not spend.
    from tenacity import Retrying, retry_if_exception_type, stop_before_delay, wait_exponential

    retrying = Retrying(
        retry=retry_if_exception_type(SlurmSilent),
        stop=stop_before_delay(patience_s),
        wait=wait_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S),
        reraise=True,
    )
    for attempt in retrying:
        if done is not None and attempt.retry_state.attempt_number > 1 and done():
            break
        with attempt:
            return _once(argv, deadline_s)
    return ""


def _once(argv: tuple[str, ...], deadline_s: float) -> str:
    name = argv[0]
    if shutil.which(name) is None:
        raise SlurmError(f"{name} is not on this machine", where=name, remedy="run this where Slurm's commands are: a login node")
    env = {key: value for key, value in os.environ.items() if not key.startswith(_DISPLAY)} | {"SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=env, timeout=deadline_s
        )
    except subprocess.TimeoutExpired:
        raise SlurmSilent(f"{name} did not answer within {deadline_s:.0f} s", where=" ".join(argv)) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        if _SILENT.search(said):
            raise SlurmSilent(f"{name} got no answer", where=" ".join(argv), value=said)
        raise SlurmError(f"{name} refused", where=" ".join(argv), value=said)
    return done.stdout
