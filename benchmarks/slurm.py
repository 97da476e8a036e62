"""The cost of Slurm: submission, startup on two nodes, and recovery from a killed rank and a killed node.

    python benchmarks/slurm.py [--rounds N]        # as root; starts a cluster of its own (slurm/testbed.py)

Every round runs the same tiny model on this machine and on two nodes of the cluster, with two single-threaded ranks, because all
nodes share this machine's cores. Writes a table into RESULTS.md.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import sides

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "slurm"))

from testbed_cluster import Testbed
from testbed_config import Settings

from launcher.worker.ranks.rank_env import RankTitle

SETTINGS = (
    *("model=tiny", "data.max_length=64", "train.global_batch_size=4", "eval.sample=false", "tracking=none"),
    *("export.enabled=false", "eval.at_start=false", "train.max_steps=100000", "checkpoint.save_every=20"),
)
ON_SLURM = ("+cluster=slurm", "cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.exclusive=false", "cluster.time=20:00")
DEADLINE_S = 180.0
SLOT = 60


def main() -> None:
    args = sides.parser(__doc__, rounds=3, rounds_help="runs of each kind").parse_args()
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        bed = Testbed(Path(folder) / "slurm")
        bed.start(Settings(slot=SLOT, nodes=3))
        try:
            launch(bed, "data", *SETTINGS)
            for number in range(args.rounds):
                for name, seconds in one_round(bed, Path(folder) / f"runs{number}").items():
                    rows.setdefault(name, []).append(seconds)
                print(f"round {number + 1}: { ({name: round(values[-1], 1) for name, values in rows.items()}) }", flush=True)
        finally:
            bed.stop()
    ratio = statistics.median(a / b for a, b in zip(rows["start, two nodes"], rows["start, local"], strict=True))
    table = [f"| {name} | {statistics.median(v):.2f} | {min(v):.2f} to {max(v):.2f} |" for name, v in rows.items()]
    table = ["| what | s | range |", "|---|---|---|", *table, "", f"start on two nodes / local: {ratio:.2f}"]
    command = sides.typed("slurm.py", "--rounds", args.rounds)
    source = "From `python -m launcher` on the benchmark's own Slurm cluster (metrics.jsonl of the runs)."
    sides.record(args.results, "Slurm", "Slurm, two nodes x 1 rank", source, command, table)


def one_round(bed: Testbed, root: Path) -> dict[str, float]:
    """Return the seconds of each part of one round."""
    found: dict[str, float] = {}
    launch(bed, *SETTINGS, "--detach", f"run.root={root}", "run.name=local")
    local = root / "local"
    await_step(local, 1)
    found["start, local"] = step_time(local, 1) - began(local)
    launch(bed, "cancel", str(local), "--no-save")
    time.sleep(2)

    before = time.monotonic()
    launch(bed, *SETTINGS, *ON_SLURM, f"run.root={root}", "run.name=slurm")
    found["submission"] = time.monotonic() - before
    run = root / "slurm"
    await_step(run, 1)
    job = json.loads((run / "attempts/001/submitted.json").read_text())["job"]
    found["start, two nodes"] = step_time(run, 1) - born(run / f"jobs/{job}/{job}_0_log.out")

    await_step(run, 30)
    killed = time.time()
    ranks(bed, run, "n2")[0].kill()
    found["killed rank to next step"] = await_value(lambda: after(run, killed, restarts=1)) - killed
    await_step(run, max(m["trainer/step"] for m in steps(run)) + 25)

    bed.kill("n2")
    await_value(lambda: "RUNNING" not in bed.output("squeue", "-h", "-j", job, "-o", "%T") or None)
    given = await_value(lambda: (bed.output("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING" and time.time()) or None)
    found["nodes given again to next step"] = await_value(lambda: after(run, given, attempt=2)) - given
    launch(bed, "cancel", str(run), "--no-save")
    bed.reset()
    return found


def launch(bed: Testbed, *arguments: str) -> None:
    env = {**bed.env, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "launcher", *arguments], capture_output=True, text=True, env=env, timeout=300)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stdout}{done.stderr}")


def steps(run: Path) -> list[dict[str, float]]:
    """Return the lines of all steps, including steps that were done twice."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [m for m in map(json.loads, lines) if "train/loss" in m]


def step_time(run: Path, step: int) -> float:
    return next(m["time"] for m in steps(run) if m["trainer/step"] == step)


def after(run: Path, moment: float, *, restarts: int = 0, attempt: int = 1) -> float | None:
    """Return when the first step of that restart or attempt was done; None if it is not done yet."""
    wanted = (m["time"] for m in steps(run) if m["time"] > moment and m["run/restarts"] >= restarts and m["attempt"] >= attempt)
    return next(wanted, None)


def began(run: Path) -> float:
    """Return when the attempt's folder was created, just before its agent started."""
    return min(p.stat().st_mtime for p in (run / "attempts/001").iterdir() if p.name == "attempt.json")


def born(file: Path) -> float:
    """Return when Slurm created the job's output file, which is when its batch script began."""
    return float(subprocess.run(["stat", "--format=%.3W", file], capture_output=True, text=True, check=True).stdout)


def await_step(run: Path, step: float) -> None:
    await_value(lambda: any(m["trainer/step"] >= step for m in steps(run)) or None)


def await_value(value: Callable[[], float | bool | None]) -> float:
    end = time.monotonic() + DEADLINE_S
    while (found := value()) is None:
        if time.monotonic() > end:
            raise SystemExit(f"waited {DEADLINE_S:.0f} s in vain")
        time.sleep(0.1)
    return float(found)


def ranks(bed: Testbed, run: Path, node: str) -> list[psutil.Process]:
    processes = [psutil.Process(pid) for pid in bed.processes(node)]
    return [p for p in processes if (title := RankTitle.of(p)) is not None and str(run) in title.plan_path]


if __name__ == "__main__":
    main()
