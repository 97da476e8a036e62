"""Whether a run is alive, for commands that start it again, change it or remove it."""

from __future__ import annotations

import functools
import sys

from launcher import run_store
from launcher.cli import formatting
from launcher.clusters import detached_process
from launcher.clusters.backends import StatusReader, cluster_for
from launcher.errors import LauncherError, Problem, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.shell_commands import launcher_command


def require_ended(run: RunDir) -> None:
    """Refuse a run that another machine still refreshes although its backend judges that it has ended.

    Raises:
        SubmitError: with the process that runs it.
    """
    if not detached_process.is_still_refreshed(run, functools.partial(print, file=sys.stderr, flush=True)):
        return
    raise SubmitError(
        "the run is still alive, although its last sign of life seems to be minutes old: the clocks of two machines differ",
        where=str(run.root),
        value=formatting.whereabouts(run, run_store.read_status(run), run_store.newest_attempt(run)),
        remedy="compare `date` on both machines, and correct the wrong clock; to stop the run, type cancel on its own machine",
    )


def require_idle(run: RunDir, backend: StatusReader) -> None:
    """Refuse to start a run that is already running.

    Raises:
        SubmitError: with the job or process that runs it.
    """
    status = backend.status(run)
    if status.state not in RUNNING_STATES:
        require_ended(run)
        return
    name = formatting.short(run.root)
    starter = run_store.start_lock_holder(run) if status.job is None else None
    number = run_store.newest_attempt(run)
    where = f"being started by {starter}" if starter is not None else formatting.whereabouts(run, status, number)
    raise SubmitError(
        f"the run is {status.state} already",
        where=str(run.root),
        value=where,
        remedy=f"follow it with: {launcher_command('logs', name, '-f')}, or stop it with: {launcher_command('cancel', name)}",
    )


def find_living_problem(run: RunDir) -> Problem | None:
    """Return why a run counts as live, or None if its backend knows that it has ended."""
    try:
        recorded = run_store.read_status(run)
        # A final state is the same on every backend, so a damaged plan need not be read.
        status = recorded
        if recorded.state in RUNNING_STATES:
            status = cluster_for(run_store.read_placement(run).kind).status(run)
    except LauncherError as error:
        first = error.problems[0]
        message = f"it is unknown whether the run {run.root.name} has ended: {first.message}"
        remedy = f"{first.remedy}; or, if no process of it lives, remove its folder yourself".removeprefix("; or, ")
        return Problem(message, first.where or str(run.root), first.value, remedy)
    if status.state in RUNNING_STATES:
        cancel = f"stop it first: {launcher_command('cancel', run.root)}"
        return Problem(f"the run {run.root.name} is {status.state}", str(run.root), status.message, cancel)
    try:
        require_ended(run)
    except SubmitError as error:
        return error.problems[0]
    if (process := detached_process.find_process(recorded)) is not None:
        message = f"the run {run.root.name} is {status.state}, but its process is still uploading or closing files"
        return Problem(message, str(run.root), f"process {process.pid}", "wait until it has ended")
    return None
