"""A detached process of this machine that runs a run, found again by its process id and start time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from launcher import json_records, run_store
from launcher.errors import RunError
from launcher.locks import pid_namespace
from launcher.plan.run_dir import RunDir
from launcher.run_records import Liveness, Status

START_DEADLINE_S = 60.0
# Signs of life in the run directory, and without one for how long a process is taken for gone: a network file system shows
# them up to a minute late.
SIGN_EVERY_S, SILENT_S = 20.0, 180.0


def start(run: RunDir, attempt: int, module: str, arguments: Sequence[str], log: Path, name: str) -> None:
    """Start `python -m MODULE ARGUMENTS` from the run's code in a session of its own, and wait until it has announced itself.

    Raises:
        RunError: where it did not, with what it has said; `name` is what people call it.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": with_code(run.code, os.environ),
        # The folder the user stands in may be a checkout; what was submitted is what runs.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with open(log, "ab") as output:
        # A session of its own: closing the terminal or Ctrl-C does not reach the run by itself.
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    deadline = time.monotonic() + START_DEADLINE_S
    while run_store.read_status(run).attempt != attempt:
        if process.poll() is not None or time.monotonic() > deadline:
            if process.poll() is None:
                process.kill()
            run_store.update_status(run, state="failed", message=f"{name} did not start")
            raise RunError(f"{name} did not start", where=str(log), value=log.read_text(errors="replace")[-2000:])
        time.sleep(0.02)


def identity() -> dict[str, Any]:
    """How a status names the process that writes it; `space` is where its id means something."""
    this = psutil.Process()
    return {"host": os.uname().nodename, "space": pid_namespace(), "pid": this.pid, "started": this.create_time()}


def start_liveness_file(run: RunDir) -> None:
    """Keep the run's liveness file fresh for as long as this process lives, for readers on other machines."""

    def refresh() -> None:
        while True:
            # A failed write skips one refresh and must not end the thread.
            with suppress(OSError):
                write_liveness(run)
            time.sleep(SIGN_EVERY_S)

    threading.Thread(target=refresh, name="liveness-file", daemon=True).start()


def write_liveness(run: RunDir) -> None:
    """Write a sign of life of this process into the run directory."""
    json_records.write(run.alive, Liveness(time.time(), os.uname().nodename))


def silence_s(run: RunDir) -> float:
    """Seconds since the last sign of life by the file system's clock, for those of two machines may differ by minutes."""
    now = time.time()
    with suppress(OSError):
        now = run_store.refresh_directory(run.root)
    signs = [0.0]
    for file in (run.status, run.alive):
        with suppress(OSError):
            signs.append(file.stat().st_mtime)
    return now - max(signs)


def lives(run: RunDir, status: Status) -> bool:
    """Whether the process that wrote the status still runs, as far as can be told from here."""
    if is_here(status):
        return find(status) is not None
    return not _booted_since(status) and silence_s(run) < SILENT_S


def find(status: Status) -> psutil.Process | None:
    """The process that wrote the status, if it lives where its id can be looked up."""
    job = status.job or {}
    if not is_here(status):
        return None
    try:
        process = psutil.Process(int(job["pid"]))
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return process if alive and abs(process.create_time() - float(job["started"])) < 1 else None
    except (KeyError, psutil.NoSuchProcess):
        return None


def await_end(run: RunDir, deadline_s: float) -> None:
    """Wait until the process that wrote the run's status is gone, and kill it where it stays."""
    process = find(run_store.read_status(run))
    if process is not None:
        try:
            process.wait(deadline_s)
        except psutil.TimeoutExpired:
            process.kill()


def way_on(run: RunDir) -> str:
    """How a run that has failed is continued."""
    return f"continue with: python -m launcher resume {run.root}"


def is_here(status: Status) -> bool:
    """True where the process would be among those that are seen from here."""
    job = status.job or {}
    # Who wrote no `space` named the machine alone.
    return job.get("space", pid_namespace()) == pid_namespace() and ("space" in job or job.get("host") == os.uname().nodename)


def _booted_since(status: Status) -> bool:
    """True where the process was one of this machine, which has started anew meanwhile."""
    job = status.job or {}
    boot, _, _ = str(job.get("space", "")).partition(" ")
    return bool(boot) and job.get("host") == os.uname().nodename and boot != pid_namespace().partition(" ")[0]


def with_code(code: Path, environ: Mapping[str, str]) -> str:
    """PYTHONPATH with the run's code first."""
    return os.pathsep.join([os.fspath(code), *filter(None, [environ.get("PYTHONPATH")])])
