"""Runs on Ray, observed from outside."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import psutil
from e2e_tools import wait_for


def started_by(run: Path) -> list[psutil.Process]:
    """Every process that has the run's folder in its environment or on its command line: Ray's own and the ranks."""
    found = []
    for process in psutil.process_iter():
        try:
            said = " ".join([*process.cmdline(), process.environ().get("PYTHONPATH", "")])
            if str(run) in said and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_all(folder: Path) -> None:
    """Drivers and ranks that still run from a folder for runs; the rest of a run's Ray goes with its driver."""
    for process in launcher_processes(folder):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def launcher_processes(run: Path) -> list[psutil.Process]:
    return [process for process in started_by(run) if "launcher" in " ".join(process.cmdline())]


def ranks_of(run: Path) -> dict[int, psutil.Process]:
    """The rank processes of a run, by rank."""
    found = [p for p in started_by(run) if "launcher.worker.entry" in " ".join(p.cmdline())]
    return {int(process.environ()["RANK"]): process for process in found}


def await_no_process(run: Path) -> None:
    wait_for("every process of the run to end", lambda: not started_by(run), 60)


def await_no_launcher(run: Path) -> None:
    """On a cluster that goes on, Ray keeps idle processes for whoever comes next."""
    wait_for("driver and ranks to end", lambda: not launcher_processes(run), 60)


def causes(run: Path) -> list[str]:
    return [json.loads(path.read_text())["cause"] for path in sorted((run / "attempts").glob("*/exit.json"))]
