"""Seconds that `status`, `ls` and `report` take for a run with many logged steps.

    python benchmarks/watching.py [--rounds N] [--steps N]

The run is a real one with two checkpoints. Its last step's line is then repeated to get the number of steps, spread over the
run's duration. Python has its bytecode, as after an earlier run, and a bare interpreter is timed in the same rounds. Writes a
table into RESULTS.md.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sides

SETTINGS = (
    *("model=tiny", "data=stdlib_docs", "data.max_length=64", "train.global_batch_size=2", "train.max_steps=4"),
    *("train.epochs=null", "checkpoint.save_every=2", "checkpoint.keep_last=2", "eval.sample=false", "export.enabled=false"),
    *("tracking.kind=none", "cluster.ranks_per_node=2", "cluster.price_per_gpu_hour=2"),
)
TIMEOUT_S = 60.0


def main() -> None:
    parser = sides.parser(__doc__, rounds=15, rounds_help="times that each command is given")
    parser.add_argument("--steps", type=int, default=10_000, help="steps that the run has logged")
    args = parser.parse_args()
    took: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        run = Path(folder) / "runs" / "bench"
        launcher = [sys.executable, "-m", "launcher"]
        sides.run([*launcher, "train", *SETTINGS, f"run.root={run.parent}", "run.name=bench"], Path(folder) / "log")
        num_metrics = lengthen(run / "metrics.jsonl", args.steps)
        size = (run / "metrics.jsonl").stat().st_size / 1e6
        asked = {
            "a bare interpreter": [sys.executable, "-c", "pass"],
            "status": [*launcher, "status", str(run)],
            "ls": [*launcher, "ls", "--root", str(run.parent)],
            "report": [*launcher, "report", str(run), "--html", str(run.parent / "report.html")],
        }
        environment = {**sides.user_environment(Path(folder)), "PYTHONPATH": str(sides.HERE.parent)}
        for round_number in range(args.rounds + 1):
            for name, command in asked.items():
                began = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S, env=environment)
                # The first round writes the bytecode and is not counted.
                if round_number:
                    took.setdefault(name, []).append(time.perf_counter() - began)
    rows = [f"| {name} | {statistics.median(of):.3f} | {min(of):.3f} to {max(of):.3f} |" for name, of in took.items()]
    sides.record(
        args.results,
        "status, ls and report",
        f"looking at a run of {args.steps:,} steps with {num_metrics} metrics each ({size:.1f} MB)",
        "From `python -m launcher status`, `ls` and `report`.",
        sides.typed("watching.py", "--rounds", args.rounds, "--steps", args.steps),
        ["| command | s, median | range |", "|---|---|---|", *rows],
    )


def lengthen(metrics: Path, steps: int) -> int:
    """Repeat a run's last step `steps` times, spread between its first and last log times; return its number of metrics."""
    trained = [line for line in map(json.loads, metrics.read_text().splitlines()) if "train/loss" in line]
    first, last = trained[0], trained[-1]
    step_s = (last["time"] - first["time"]) / steps
    with open(metrics, "w", encoding="utf-8") as file:
        for i in range(steps):
            file.write(json.dumps({**last, "trainer/step": i + 1, "time": first["time"] + i * step_s}) + "\n")
    return len(last)


if __name__ == "__main__":
    main()
