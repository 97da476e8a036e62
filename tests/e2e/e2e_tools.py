"""Runs on this machine, observed from outside: their processes, their files, their end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from launcher.worker.rank import RankTitle

TINY = ("model=tiny", "data.max_length=64", "train.global_batch_size=4", "train.sample=false", "tracking=none")


def wait_for(what: str, condition: Callable[[], object], deadline_s: float = 120) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s for {what}"
        time.sleep(0.05)


def metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(run: Path) -> dict[int, float]:
    """The last value of each step."""
    return {m["trainer/step"]: m["train/loss"] for m in metrics(run) if "train/loss" in m}


def last_step(run: Path) -> int:
    return max(losses(run), default=0)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def agent_of(run: Path) -> psutil.Process:
    return psutil.Process(status(run)["job"]["pid"])


def command_line(process: psutil.Process) -> str:
    """The words of a process, none where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def ranks_of(run: Path) -> list[psutil.Process]:
    """The rank processes, by rank."""
    return [process for _, process in sorted(by_rank(agent_of(run).children()).items())]


def by_rank(processes: Iterable[psutil.Process]) -> dict[int, psutil.Process]:
    """Those that are ranks, without what ends meanwhile."""
    found = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if (title := RankTitle.of(process)) is not None:
                found[title.rank] = process
    return found


def kill_all_of(root: Path) -> None:
    """What still runs from a folder for runs; some of it may just be ending by itself."""
    for process in processes_of(root):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def processes_of(run: Path) -> list[psutil.Process]:
    """Every process that names the run's directory on its command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(run) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
