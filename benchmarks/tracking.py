"""What tracking costs: metrics.jsonl, the terminal's lines and W&B (offline) together, one log a step, with the tiny model.

    python benchmarks/tracking.py [--blocks N] [overrides of the launcher]

Within one run, blocks of steps with all trackers alternate with blocks in which nothing is said to any, so that what else the
machine does falls on both; each block is compared with its neighbours. The time that rank 0's loop spends inside the trackers is
measured beside that. Appends a table to RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLOCK, WARMUP = 10, 20
SETTINGS = (
    *("model=tiny", "data=stdlib_docs", "data.max_length=256", "train.global_batch_size=4", "cluster.ranks_per_node=2"),
    *("tracking=wandb", "tracking.mode=offline", "train.eval_at_start=false", "train.sample=false", "train.export=false"),
)


class NoStop:
    at: float | None = None

    def __call__(self) -> str | None:
        return None

    def cancel(self) -> None:
        """Nobody asks."""


class Alternating:
    """Passes on what is said in even blocks of steps; notes when each step was logged, and how long that took."""

    def __init__(self, trackers: Any) -> None:
        self._trackers = trackers
        self.ends: list[float] = []
        self.spent: list[float] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        began = time.perf_counter()
        if step <= WARMUP or is_on(step):
            self._trackers.log(step, metrics)
        if "train/loss" in metrics:
            self.ends.append(time.perf_counter())
            self.spent.append(self.ends[-1] - began)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trackers, name)


def is_on(step: int) -> bool:
    return (step - WARMUP - 1) // BLOCK % 2 == 0


def main() -> None:
    import sides

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12, help="blocks of steps with tracking, and as many without")
    args, overrides = parser.parse_known_args()
    steps = WARMUP + 2 * BLOCK * args.blocks
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as name:
        folder = Path(name)
        settings = [*SETTINGS, f"train.max_steps={steps}", f"run.root={folder / 'runs'}", "run.name=bench", *overrides]
        plan_file, launcher = folder / "plan.json", [sys.executable, "-m", "launcher"]
        sides.run([*launcher, "data", *settings], folder / "data.log")
        plan_file.write_text(sides.run([*launcher, "plan", "--json", *settings], folder / "plan.log"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        output = sides.run([*command, str(Path(__file__).resolve()), "--rank", str(plan_file)], folder / "log")
        found = json.loads(next(line for line in output.splitlines() if line.startswith('{"ends"')))
    command_line = f"`python benchmarks/tracking.py --blocks {args.blocks} {' '.join(overrides)}`".replace(" `", "`")
    sides.record(f"tracking, {steps} steps of 2 ranks, blocks of {BLOCK}", [command_line], table(found["ends"], found["spent"]))


def table(ends: list[float], spent: list[float]) -> list[str]:
    """Medians over blocks; `ends` and `spent` are those of steps 1, 2, ..."""
    took = {step: ends[step - 1] - ends[step - 2] for step in range(WARMUP + 2, len(ends) + 1)}
    # The first step of a block may carry what its predecessor has left to do.
    blocks = [[took[s] for s in range(b + 2, b + BLOCK + 1)] for b in range(WARMUP, len(ends), BLOCK)]
    medians = [statistics.median(block) for block in blocks]
    on, off = medians[0::2], medians[1::2]
    # Each block with tracking against the mean of the blocks around it.
    ratios = [2 * on[i] / (off[i - 1] + off[i]) for i in range(1, len(on))]
    inside = [spent[step - 1] for step in range(WARMUP + 1, len(ends) + 1) if is_on(step)]
    share = statistics.median(inside) / statistics.median(off)
    late = sorted(inside)[-len(inside) // 100]
    middle = statistics.quantiles(ratios, n=4)
    return [
        "| what | median | range |",
        "|---|---|---|",
        f"| step without tracking, ms | {statistics.median(off) * 1e3:.2f} | {min(off) * 1e3:.2f} to {max(off) * 1e3:.2f} |",
        f"| step with all tracking, ms | {statistics.median(on) * 1e3:.2f} | {min(on) * 1e3:.2f} to {max(on) * 1e3:.2f} |",
        f"| with / without, neighbours | {statistics.median(ratios):.4f} | quartiles {middle[0]:.4f} to {middle[2]:.4f} |",
        f"| inside the trackers, ms a step | {statistics.median(inside) * 1e3:.3f} | 99% below {late * 1e3:.3f} |",
        f"| inside / step without | {share:.4f} | |",
    ]


def rank(plan_path: str) -> None:
    from launcher import run_store
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.train import loop
    from launcher.train.engine import Place

    plan = LaunchPlan.load(plan_path)
    place = Place(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), attempt=1)
    tracked: list[Alternating] = []
    start = loop.start_trackers

    def alternating(*arguments: Any) -> Any:
        tracked.append(Alternating(start(*arguments)))
        return tracked[-1]

    loop.start_trackers = alternating
    if place.is_main:
        run_store.next_attempt(run_store.create(plan), run_store.Attempt(None))
    else:
        while not (Path(plan.run_dir) / "attempts" / "001" / "attempt.json").exists():
            time.sleep(0.1)
    loop.train(plan, place, NoStop())
    if place.is_main:
        print(json.dumps({"ends": tracked[0].ends, "spent": tracked[0].spent}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    rank(sys.argv[2]) if sys.argv[1:2] == ["--rank"] else main()
