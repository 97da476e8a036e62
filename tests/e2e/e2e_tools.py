"""Inspect runs on this machine from outside: their processes, their files and how they end."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from pace import wait_for

from launcher.worker.ranks.rank_env import RankTitle

if TYPE_CHECKING:
    from torch import Tensor

TINY = ("model=tiny", "data.max_length=64", "train.global_batch_size=4", "eval.sample=false", "tracking=none")
# The run of the fixture `first_run`, which tests of interruptions and of other backends compare with.
FIRST_STEPS = 12
FIRST_RUN = (*TINY, f"train.max_steps={FIRST_STEPS}", "eval.at_start=false")
_BATCH_HOOK = Path(__file__).with_name("rows_seen")
_REPO = Path(__file__).resolve().parents[2]


def json_lines(file: Path) -> list[dict]:
    """The complete lines of a file; a line that is still being written is left out."""
    return (
        [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []
    )


def metrics(run: Path) -> list[dict]:
    return json_lines(run / "metrics.jsonl")


def losses(run: Path) -> dict[int, float]:
    """The last value of each step."""
    return {m["trainer/step"]: m["train/loss"] for m in metrics(run) if "train/loss" in m}


def last_step(run: Path) -> int:
    return max(losses(run), default=0)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def modes_of(run: Path) -> tuple[int, int]:
    """The permissions of the run directory and of the metrics file that its ranks write."""
    directory, metrics_file = (stat.S_IMODE(path.stat().st_mode) for path in (run, run / "metrics.jsonl"))
    return directory, metrics_file


def alerts(run: Path) -> list[str]:
    return [line["text"] for line in json_lines(run / "events.jsonl") if line["kind"] == "alert"]


def committed(run: Path) -> list[str]:
    """The names in the checkpoints folder."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip(checkpoint: Path) -> None:
    """Damage a checkpoint: flip a bit in the middle of a shard."""
    shard = checkpoint / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    """Damage a checkpoint: truncate a shard."""
    os.truncate(checkpoint / "rank-00001.safetensors", 4096)


def assembled(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, assembled from its shards."""
    import torch
    from safetensors.torch import load_file

    shards = [load_file(file) for file in sorted(checkpoint.glob("rank-*.safetensors"))]
    names = [name for name in shards[0] if "|" in name and not name.startswith("rng")]
    return {name: torch.cat([shard[name].reshape(-1) for shard in shards if name in shard]) for name in names}


def rows_environment(folder: Path) -> dict[str, str]:
    """Environment variables that make the ranks of a run write the rows they receive into `folder`, see rows_seen/."""
    folder.mkdir(exist_ok=True)
    return {"ROWS_SEEN": str(folder), "PYTHONPATH": f"{_BATCH_HOOK}:{_REPO}"}


def slow_steps(seconds: float = 0.5) -> dict[str, str]:
    """Environment variables that make each step of a run take at least `seconds`, see rows_seen/.

    For a run that trains while the test waits for something else: fast steps would take CPU time from other tests, and the
    undisturbed run must repeat each of them.
    """
    return {"SECONDS_PER_STEP": f"{seconds:g}", "PYTHONPATH": f"{_BATCH_HOOK}:{_REPO}"}


@contextmanager
def held(run: Path, step: int) -> Iterator[None]:
    """Wait until the run has reached `step`, then suspend a rank so that no further step completes inside the block."""
    wait_for(f"step {step}", lambda: last_step(run) >= step)
    rank = ranks_of(run)[1]
    rank.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            rank.resume()


def agent_of(run: Path) -> psutil.Process:
    return psutil.Process(status(run)["job"]["pid"])


def command_line(process: psutil.Process) -> str:
    """The command line of a process, empty if the process has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def ranks_of(run: Path) -> list[psutil.Process]:
    """The rank processes, by rank."""
    return [process for _, process in sorted(by_rank(agent_of(run).children()).items())]


def by_rank(processes: Iterable[psutil.Process]) -> dict[int, psutil.Process]:
    """The rank processes among these, by rank; processes that end meanwhile are left out."""
    ranks = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if (title := RankTitle.of(process)) is not None:
                ranks[title.rank] = process
    return ranks


def listening_addresses(processes: Iterable[psutil.Process]) -> set[str]:
    """The addresses on which any of the processes listens."""
    connections = (one for process in processes for one in process.net_connections("inet"))
    return {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}


def kill_all_of(root: Path) -> None:
    """Kill all processes of a runs folder; some may be about to end anyway."""
    for process in processes_of(root):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def processes_of(run: Path) -> list[psutil.Process]:
    """Every process that names the run's directory on its command line."""
    processes = []
    for process in psutil.process_iter():
        try:
            if str(run) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except psutil.Error:
            continue
    return processes
