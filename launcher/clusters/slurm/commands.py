"""Runs Slurm's commands with a deadline; their error messages are passed on unchanged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence

from launcher.errors import RunError

DEADLINE_S = 30.0
SEPARATOR = "\x1f"
# Seconds between tries while Slurm does not answer; they double up to the longest pause.
_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 15.0
# What they print on a machine without slurm.conf.
_NO_CONFIGURATION = re.compile(r"Could not establish a configuration source", re.IGNORECASE)
# What Slurm's commands print if no controller or database answers: messages from slurm_errno.h and the operating system.
_NO_ANSWER = re.compile(
    r"Unable to contact slurm|Socket timed out|Connection (refused|timed out|reset)|No route to host|Network is unreachable|"
    r"Zero Bytes were transmitted|Communication connection failure|standby mode|Transport endpoint is not connected",
    re.IGNORECASE,
)
# Shell variables of a user that change, sort or filter the output of Slurm's commands.
_DISPLAY = ("SQUEUE_", "SACCT_", "SACCTMGR_", "SINFO_", "SCONTROL_")


class SlurmError(RunError):
    """A command of Slurm failed or did not answer; the problem's value holds its message."""


class SlurmUnreachable(SlurmError):
    """Slurm did not answer; whether it carried out the command is unknown."""


def slurm(*argv: str, deadline_s: float = DEADLINE_S, retry_s: float = 0.0, is_done: Callable[[], bool] | None = None) -> str:
    """Run a Slurm command and return its output; times in it are seconds since the epoch.

    If Slurm does not answer, the command is retried for `retry_s` seconds; a refusal is final. An answer can be lost after the
    command was executed, so `is_done`, if given, is called before each retry; if it returns True, the result is "".

    Raises:
        SlurmUnreachable: if Slurm did not answer in time; each try has `deadline_s` seconds.
        SlurmError: if the command is missing or fails.
    """
    # The import takes 50 ms; commands that do not use Slurm avoid it.
    from tenacity import Retrying, retry_if_exception_type, stop_before_delay, wait_exponential

    retrying = Retrying(
        retry=retry_if_exception_type(SlurmUnreachable),
        stop=stop_before_delay(retry_s),
        wait=wait_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S),
        reraise=True,
    )
    for attempt in retrying:
        if is_done is not None and attempt.retry_state.attempt_number > 1 and is_done():
            break
        with attempt:
            return _run_once(argv, deadline_s)
    return ""


def slurm_table(*argv: str, fields: Sequence[str], retry_s: float = 0.0) -> list[list[str]]:
    """Run squeue or sinfo with these columns; returns the rows. Raises what `slurm` raises."""
    # A control character, because job names may contain any printable character.
    columns = ",".join(f"{field}:{SEPARATOR}" for field in fields)
    return split_rows(slurm(*argv, f"--Format={columns}", retry_s=retry_s), len(fields))


def split_rows(output: str, num_columns: int) -> list[list[str]]:
    """Split a table with SEPARATOR between its columns; squeue also writes one after the last column."""
    rows = (line.split(SEPARATOR) for line in output.split("\n"))
    return [row[:num_columns] for row in rows if len(row) >= num_columns]


def _run_once(argv: tuple[str, ...], deadline_s: float) -> str:
    name = argv[0]
    if shutil.which(name) is None:
        raise SlurmError(
            f"the command {name} is not on this machine", where=name, remedy="run this command on a login node of the cluster"
        )
    env = {key: value for key, value in os.environ.items() if not key.startswith(_DISPLAY)} | {"SLURM_TIME_FORMAT": "%s"}
    try:
        process = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=env, timeout=deadline_s
        )
    except subprocess.TimeoutExpired:
        raise SlurmUnreachable(f"{name} did not answer within {deadline_s:g} s", where=" ".join(argv)) from None
    if process.returncode:
        message = process.stderr.strip() or process.stdout.strip()
        if _NO_ANSWER.search(message):
            raise SlurmUnreachable(f"{name} got no answer from Slurm", where=" ".join(argv), value=message)
        if _NO_CONFIGURATION.search(message):
            raise SlurmError(
                "this machine is not part of a Slurm cluster: Slurm's commands find no configuration",
                where=" ".join(argv),
                value=message.splitlines()[-1],
                remedy="run this command on a login node of the cluster; `plan --script` works anywhere",
            )
        raise SlurmError(f"{name} failed", where=" ".join(argv), value=message)
    return process.stdout
