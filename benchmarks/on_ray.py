"""The cost of Ray: startup on the run's own Ray compared with a minimal TorchTrainer, and recovery from a killed rank.

    python benchmarks/on_ray.py [--rounds N]

Both sides start Ray on this machine and train the same model with the same rows. They are timed from the command to the
beginning of the first optimizer step. Then a rank is killed with SIGKILL. Writes a table into RESULTS.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import sides

from launcher.worker.ranks.rank_env import RankTitle

SETTINGS = (
    *("model=demo", "data=stdlib_docs", "data.max_length=256", "train.global_batch_size=8", "tracking=none"),
    *("eval.at_start=false", "eval.sample=false", "export.enabled=false"),
)
TINY = (
    *("model=tiny", "data.max_length=64", "train.global_batch_size=4", "eval.sample=false", "tracking=none"),
    *("export.enabled=false", "eval.at_start=false", "train.max_steps=100000", "checkpoint.save_every=20"),
)
DEADLINE_S = 180.0


def main() -> None:
    args = sides.parser(__doc__, rounds=3).parse_args()
    trainer, launcher, again = [], [], []
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        prepared = sides.prepare(Path(folder), [*SETTINGS], steps=2, warmup=1)
        sides.run([sys.executable, "-m", "launcher", "data", *TINY], Path(folder) / "tiny.log")
        for number in range(args.rounds):
            trainer.append(sides.ray_side(prepared)["to_first_step_s"])
            launcher.append(sides.launcher_side(prepared, ("+cluster=ray",))["to_first_step_s"])
            again.append(killed_rank(Path(folder) / f"runs{number}"))
            row = f"TorchTrainer {trainer[-1]:.1f} s, launcher {launcher[-1]:.1f} s, after a kill {again[-1]:.1f} s"
            print(f"round {number + 1}: {row}", flush=True)
    ratio = statistics.median(a / b for a, b in zip(launcher, trainer, strict=True))
    rows = {"minimal TorchTrainer": trainer, "launcher, +cluster=ray": launcher, "killed rank to next step": again}
    table = [f"| {name} | {statistics.median(v):.1f} | {min(v):.1f} to {max(v):.1f} |" for name, v in rows.items()]
    table = ["| what | s | range |", "|---|---|---|", *table, "", f"start, launcher / TorchTrainer: {ratio:.2f}"]
    command = sides.typed("on_ray.py", "--rounds", args.rounds)
    sides.record(args.results, "Ray", "Ray on one machine, 2 workers", sides.FROM_TRAIN, command, table)


def killed_rank(root: Path) -> float:
    """Return the seconds from killing rank 1 to the end of the next step."""
    run = root / "tiny"
    command = [sys.executable, "-m", "launcher", *TINY, "+cluster=ray", "--detach", f"run.root={root}", "run.name=tiny"]
    sides.run(command, root.parent / "ray.log")
    try:
        await_step(run, 30)
        killed = time.time()
        rank_1(run).kill()
        return await_step(run, 1, restarts=1) - killed
    finally:
        subprocess.run([sys.executable, "-m", "launcher", "cancel", str(run), "--no-save"], capture_output=True, timeout=60)
        end = time.monotonic() + DEADLINE_S
        while json.loads((run / "status.json").read_text())["state"] != "cancelled" and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(3)


def rank_1(run: Path) -> psutil.Process:
    for process in psutil.process_iter():
        # Processes may end during the search.
        with suppress(psutil.NoSuchProcess):
            title = RankTitle.of(process)
            if title is not None and title.rank == 1 and str(run) in title.plan_path:
                return process
    raise SystemExit("no rank 1")


def await_step(run: Path, step: int, restarts: int = 0) -> float:
    """Wait until a step from this one on is done after so many restarts; return the time in seconds since the epoch."""
    file, end = run / "metrics.jsonl", time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        for line in file.read_text().splitlines() if file.is_file() else ():
            found = json.loads(line)
            if "train/loss" in found and found["run/restarts"] >= restarts and found["trainer/step"] >= step:
                return float(found["time"])
        time.sleep(0.1)
    raise SystemExit(f"waited {DEADLINE_S:.0f} s for step {step} after {restarts} restarts in {os.fspath(run)}")


if __name__ == "__main__":
    main()
