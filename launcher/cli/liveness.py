"""Whether a run is alive, for commands that start it again, change it or remove it."""

from __future__ import annotations

import functools
import sys
import time

from launcher import run_store
from launcher.clusters import detached_process
from launcher.clusters.backends import StatusReader, cluster_for
from launcher.errors import LauncherError, Problem, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Status
from launcher.shell_commands import launcher_command, short_path


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
        value=_describe_attempt(run, run_store.read_status(run), run_store.newest_attempt(run)),
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
    name = short_path(run.root)
    starter = run_store.start_lock_holder(run) if status.job is None else None
    number = run_store.newest_attempt(run)
    where = f"being started by {starter}" if starter is not None else _describe_attempt(run, status, number)
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


def _describe_attempt(run: RunDir, status: Status, attempt: int) -> str:
    """Return an attempt's job or process, its nodes, its user and its start."""
    job = status.job or {}
    started_at = job.get("started")
    if "pid" in job:
        location = f"process {job['pid']} on {job.get('host')}"
    elif "id" in job:
        location = f"job {job['id']}" + (f" on {', '.join(job['nodes'])}" if job.get("nodes") else "")
    else:
        location = "no machines yet"
    if started_at is None:
        file = run.attempt(attempt) / "attempt.json"
        started_at = file.stat().st_mtime if file.is_file() else status.updated_at
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(started_at)))
    try:
        user = run.root.owner()
    except KeyError:
        user = str(run.root.stat().st_uid)
    return f"attempt {attempt}, {location}, of user {user}, since {since}"
