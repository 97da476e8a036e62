"""The detached process behind a run: start it, find it again by process id and start time, and judge whether it is alive."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from launcher.errors import RunError, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, run_records, run_store
from launcher.runs.locks import is_same_start, pid_namespace, read_start
from launcher.runs.run_records import RUNNING_STATES, CancelRequest, Liveness, Status
from launcher.shell_commands import launcher_command

START_DEADLINE_S = 60.0
# Seconds between refreshes of the liveness file, and seconds without a refresh after which the process counts as lost. A network
# file system may show a refresh a minute late.
LIVENESS_INTERVAL_S, LIVENESS_TIMEOUT_S = 20.0, 180.0
# How long to watch for a refresh, and the silence that no difference between two machines' clocks explains.
_WATCH_S, _CERTAIN_S = 30.0, 3600.0
_LOOK_S = 1.0


def start(
    run: RunDir,
    attempt: int,
    module: str,
    arguments: Sequence[str],
    log: Path,
    name: str,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE ARGUMENTS` from the run's code snapshot, detached, and wait until it has set the run's status.

    Messages refer to the process as `name`. Its output goes to `log`.

    Raises:
        RunError: if the process does not set the status in time, with the end of its log.
    """
    process = start_module(run, module, arguments, log, variables)
    deadline = time.monotonic() + START_DEADLINE_S
    while run_store.read_status(run).attempt != attempt:
        if process.poll() is not None or time.monotonic() > deadline:
            if process.poll() is None:
                process.kill()
            run_store.update_status(run, state="failed", attempt=attempt, message=f"{name} did not start")
            raise RunError(f"{name} did not start", where=str(log), value=log.read_text(errors="replace")[-2000:])
        time.sleep(0.02)
    return process


def start_module(
    run: RunDir,
    module: str,
    arguments: Sequence[str],
    log: Path,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE ARGUMENTS` from the run's code snapshot, with `variables` in its environment; it writes to `log`.

    In its own session, it survives the terminal and receives no Ctrl-C.
    """
    environment = {
        **os.environ,
        **python_variables(run.code, os.environ),
        "PYTHONUNBUFFERED": "1",
        **(variables or {}),
    }
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            # As in a batch job: only the run's user can access what it writes.
            umask=0o077,
        )


def describe_this_process() -> dict[str, Any]:
    """Return the `job` entry of a status that this process writes."""
    return describe_process(os.getpid())


def describe_process(pid: int) -> dict[str, Any]:
    """Return host, PID namespace (`space`), process id and start of a process on this machine.

    The start is `started`, in seconds since the epoch, and `started_after_boot`, in seconds after the machine's boot.
    """
    started = psutil.Process(pid).create_time()
    identity = {"host": os.uname().nodename, "space": pid_namespace(), "pid": pid}
    return {**identity, "started": started, "started_after_boot": read_start(pid)}


def start_liveness_file(run: RunDir) -> None:
    """Refresh the run's liveness file for as long as this process lives, for readers on other machines."""

    def refresh() -> None:
        while True:
            # A failed write skips one refresh and must not end the thread.
            with suppress(OSError):
                write_liveness(run)
            time.sleep(LIVENESS_INTERVAL_S)

    threading.Thread(target=refresh, name="liveness-file", daemon=True).start()


def write_liveness(run: RunDir) -> None:
    """Write this process's heartbeat to the run directory."""
    json_records.write(run.alive, Liveness(time.time(), os.uname().nodename))


def seconds_silent(run: RunDir) -> float:
    """Return the seconds since the last heartbeat in the run directory."""
    return _seconds_unchanged(run, (run.status, run.alive))


def seconds_without_output(run: RunDir) -> float:
    """Return the seconds since a run last wrote its status, metrics, events or logs: runs on Slurm have no liveness file."""
    logs = run.attempt(run_store.newest_attempt(run)).glob("*.log")
    return _seconds_unchanged(run, (run.status, run.metrics, run.events, *logs, *run.jobs.glob("*/*.out")))


def _seconds_unchanged(run: RunDir, files: Iterable[Path]) -> float:
    """Return the seconds since one of the files was last written.

    Uses the file system's clock if possible, because machine clocks may differ by minutes.
    """
    now = time.time()
    with suppress(OSError):
        now = atomic_files.refresh_directory(run.root)
    modified_at = [0.0]
    for file in files:
        with suppress(OSError):
            modified_at.append(file.stat().st_mtime)
    return now - max(modified_at)


def is_alive(run: RunDir, status: Status) -> bool:
    """Return whether the process that wrote the status still runs; on another machine, it is judged by its liveness file."""
    if is_visible(status):
        return find_process(status) is not None
    return not _has_rebooted(status) and seconds_silent(run) < LIVENESS_TIMEOUT_S


def is_still_refreshed(run: RunDir, say: Callable[[str], None]) -> bool:
    """Return whether a run on another machine refreshes its files although it seems to have ended; watches for half a minute.

    Backends compare the time of the last refresh with that of a file written now. Some network file systems store the clock of
    the machine that wrote a file, so the times may differ by minutes. Starting or removing a run needs more certainty. `say`
    announces the wait.
    """
    status = run_store.read_status(run)
    job = status.job or {}
    if status.state not in RUNNING_STATES or "pid" not in job or is_visible(status) or _has_rebooted(status):
        return False
    files = (run.status, run.alive)
    if _seconds_unchanged(run, files) > _CERTAIN_S:
        return False
    say(f"checking for {_WATCH_S:.0f} seconds whether the run {run.root.name} is still alive on {job.get('host')}")
    before, until = _read_all(files), time.monotonic() + _WATCH_S
    while time.monotonic() < until:
        time.sleep(_LOOK_S)
        if _read_all(files) != before:
            return True
    return False


def _read_all(files: Iterable[Path]) -> dict[Path, bytes]:
    """Return the content of the files that can be read."""
    contents = {}
    for file in files:
        with suppress(OSError):
            atomic_files.refresh_directory(file.parent)
        with suppress(OSError):
            contents[file] = file.read_bytes()
    return contents


def find_process(status: Status) -> psutil.Process | None:
    """Return the process that wrote the status, or None if it has ended or belongs to another machine or container."""
    job = status.job or {}
    if not is_visible(status):
        return None
    try:
        process = psutil.Process(int(job["pid"]))
        started = read_start(process.pid)
        return process if started is not None and is_same_start(started, job["started_after_boot"]) else None
    except (KeyError, psutil.NoSuchProcess):
        return None


def await_end(run: RunDir, deadline_s: float) -> None:
    """Wait until the process that wrote the run's status has ended; kill it after `deadline_s` seconds."""
    process = find_process(run_store.read_status(run))
    if process is not None:
        try:
            process.wait(deadline_s)
        except psutil.TimeoutExpired:
            process.kill()


def resume_hint(run: RunDir) -> str:
    """Return the command that continues a failed run, for a message."""
    return f"continue with: {launcher_command('resume', run.root)}"


def is_visible(status: Status) -> bool:
    """Return whether this process shares a PID namespace with the one that wrote the status."""
    job = status.job or {}
    # A record without `space` only identifies the machine.
    return job.get("space", pid_namespace()) == pid_namespace() and ("space" in job or job.get("host") == os.uname().nodename)


def _has_rebooted(status: Status) -> bool:
    """Return whether the process ran on this machine before the last reboot."""
    job = status.job or {}
    boot, _, _ = str(job.get("space", "")).partition(" ")
    return bool(boot) and job.get("host") == os.uname().nodename and boot != pid_namespace().partition(" ")[0]


def python_variables(code: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which Python imports the launcher from `code`.

    It imports nothing from the current folder, which may contain another launcher.
    """
    path = os.pathsep.join([os.fspath(code), *filter(None, [environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def request_cancel(run: RunDir, status: Status, save: bool) -> CancelRequest | None:
    """Write the request that a run's processes look for; a second one never asks for a save. Returns the previous request.

    Raises:
        SubmitError: if the run is not running.
    """
    if status.state not in RUNNING_STATES:
        raise not_running_error(run, status)
    number = run_store.newest_attempt(run)
    previous = run_records.read_cancel(run, number)
    json_records.write(run.cancel(number), CancelRequest(time.time(), save and previous is None))
    return previous


def not_running_error(run: RunDir, status: Status) -> SubmitError:
    """Build the error for a request to cancel a run that has ended."""
    remedy = f"there is nothing to cancel; look at it with: {launcher_command('status', run.root)}"
    return SubmitError(f"the run is not running: it is {status.state}", where=str(run.root), remedy=remedy)
