"""Inspect runs on Ray from outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pace
import psutil
from e2e_tools import by_rank, command_line, json_lines, metrics

from launcher import run_store
from launcher.plan.run_dir import RunDir

# For a run, or for any event in it, on a machine that is busy with other tests: starting Ray's processes alone can take minutes.
DEADLINE_S = 500.0


def wait_for(what: str, condition: Callable[[], object]) -> None:
    pace.wait_for(what, condition, DEADLINE_S)


def started_by(run: Path) -> list[psutil.Process]:
    """Every process with the run's folder in its PYTHONPATH (Ray's own) or on its command line (the title of ranks)."""
    processes = []
    for process in psutil.process_iter():
        try:
            text = " ".join([*process.cmdline(), process.environ().get("PYTHONPATH", "")])
            if str(run) in text and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def kill_all(folder: Path) -> None:
    """Kill drivers and ranks that still run from a runs folder; the rest of a run's own Ray ends with its driver."""
    for process in launcher_processes(folder):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def launcher_processes(run: Path) -> list[psutil.Process]:
    return [process for process in started_by(run) if "launcher" in command_line(process)]


def ranks_of(run: Path) -> dict[int, psutil.Process]:
    """The rank processes of a run, by rank."""
    return by_rank(started_by(run))


def await_no_process(run: Path) -> None:
    wait_for("every process of the run to end", lambda: not started_by(run))


def await_no_launcher(run: Path) -> None:
    """Wait only for the launcher's processes: on a shared cluster, Ray keeps idle workers for the next job."""
    wait_for("driver and ranks to end", lambda: not launcher_processes(run))


def causes(run: Path) -> list[str]:
    return [json.loads(path.read_text())["cause"] for path in sorted((run / "attempts").glob("*/exit.json"))]


def environments_of(folder: Path, attempt: int) -> list[dict[str, str | None]]:
    """Selected environment variables of each rank of an attempt, see rows_seen/."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{attempt:03d}-*.environ"))]


def alerts(run: Path, attempt: int) -> str:
    """The alerts of an attempt, one per line."""
    lines = json_lines(run / "events.jsonl")
    return "\n".join(line["text"] for line in lines if line["attempt"] == attempt)


def newest_saved(run: Path, attempt: int) -> int:
    """The step of the newest checkpoint that an attempt committed, 0 if there is none."""
    manifests = [json.loads(file.read_text()) for file in (run / "checkpoints").glob("step-*/manifest.json")]
    return max((manifest["step"] for manifest in manifests if manifest["attempt"] == attempt), default=0)


def trained(run: Path, attempt: int) -> list[int]:
    """The steps that an attempt has logged."""
    return [line["trainer/step"] for line in metrics(run) if line["attempt"] == attempt and "train/loss" in line]


def rows_of(run: Path, folder: Path) -> dict[int, list[tuple[int, list[int]]]]:
    """The rows of each step, once per time it was trained: the number of ranks, and the sorted rows of all ranks.

    Batches prepared for a step that the attempt never reached are left out.
    """
    rows: dict[int, list[tuple[int, list[int]]]] = {}
    trained = {(line["attempt"], int(line["trainer/step"])) for line in metrics(run) if "train/loss" in line}
    for attempt in sorted({number for number, _ in trained}):
        record = run_store.read_attempt(RunDir(run), attempt)
        batches = [
            [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(folder.glob(f"{attempt:03d}-*.jsonl"))
        ]
        assert len(batches) == len(record.nodes) or record.nodes == ()
        for step in sorted(step for number, step in trained if number == attempt):
            parts = [rank[step - (record.resume_step or 0) - 1] for rank in batches]
            own = sorted(row for part in parts for row in part["own"])
            assert all(sorted(part["all"]) == own for part in parts), "together the ranks have the whole batch, once"
            rows.setdefault(step, []).append((len(parts), own))
    return rows


def await_training(run: Path, num_ranks: int) -> None:
    """Wait until an attempt with this many ranks has logged a step."""

    def training() -> bool:
        attempts = {line["attempt"] for line in metrics(run) if "train/loss" in line}
        newest = max(attempts, default=0)
        return newest > 0 and len(run_store.read_attempt(RunDir(run), newest).nodes) == num_ranks

    wait_for(f"training on {num_ranks} ranks", training)


Ranks = dict[int, psutil.Process]
Fault = Callable[[Path, Ranks], None]


def hang_worker(run: Path, ranks: Ranks) -> None:
    """Suspend a rank and its worker, as if their machine hung: nothing reports about the rank any more."""
    worker = ranks[1].parent()
    assert "ray::" in command_line(worker)
    worker.suspend()
    ranks[1].suspend()


def assert_survived(run: Path, attempt: int, fault: Fault) -> Ranks:
    """Cause a fault in an attempt, check how the next attempt continues, and return the ranks that the fault hit."""

    def has_progressed() -> bool:
        saved = newest_saved(run, attempt)
        return saved > 0 and max(trained(run, attempt), default=0) > saved

    wait_for(f"a checkpoint of attempt {attempt} and another step", has_progressed)
    before = ranks_of(run)
    fault(run, before)
    following = run / f"attempts/{attempt + 1:03d}"
    wait_for(f"the attempt after {fault.__name__}", (following / "marker").exists)
    assert not any(rank.is_running() for rank in before.values()), "no rank of the attempt before is left"
    saved = run_store.read_attempt(RunDir(run), attempt + 1).resume_step
    assert saved == newest_saved(run, attempt)
    assert saved > 0
    wait_for(f"a step after {fault.__name__}", lambda: trained(run, attempt + 1))
    assert trained(run, attempt + 1)[0] == saved + 1, "no more is repeated than was done since the last checkpoint"
    return before
