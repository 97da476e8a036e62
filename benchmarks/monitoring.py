"""What the watch over all ranks costs rank 0 in each step, beside the all-reduce that there is anyway.

    python benchmarks/monitoring.py

Calls of the loop's functions in one process, since so many ranks are not to be had here; no communication, in CPU time: packing
this rank's numbers, unpacking those of all, metrics, alerts, goodput. Writes a table into RESULTS.md.
"""

from __future__ import annotations

import time

import sides
import torch

from launcher.tracking.goodput import Breakdown
from launcher.train.monitoring import rank_stats
from launcher.train.monitoring.anomalies import Health
from launcher.train.monitoring.gpu_stats import Sample
from launcher.train.monitoring.rank_stats import SLOTS, Told

STEPS = 300
SAMPLE = Sample(5, 0.97, 0.8, 650, 70, 0, 0, 0.3, 0.4)


def main() -> None:
    args = sides.parser(__doc__, rounds=None).parse_args()
    lines = ["| ranks | rank 0's CPU time for each step that is logged, us | the slowest of 100, us |", "|---|---|---|"]
    for world_size in (2, 64, 512):
        health, spent = Health("cuda"), Breakdown(1e5, 9e4)
        others = [value for rank in range(world_size) for value in Told(2.0, 1e-4, 1e-6 + rank * 1e-12, sample=SAMPLE).values()]
        taken = []
        for step in range(STEPS):
            began = time.thread_time()
            values = [0.0] * (SLOTS * world_size)
            values[:SLOTS] = Told(2.0, 1e-4, 1e-6, sample=SAMPLE).values()
            shared = torch.tensor([0.0] * 4 + values, dtype=torch.float64)
            packed = time.thread_time() - began
            shared[4:] = torch.tensor(others, dtype=torch.float64)
            began = time.thread_time()
            told = rank_stats.told(shared.tolist()[4:])
            works = rank_stats.work(told)
            rank_stats.metrics(told, works)
            list(health.faults(told, ["n"] * world_size))
            list(health.stragglers(works, ["n"] * world_size))
            health.step(2.0 - step * 1e-6, 1000.0)
            spent.extended(step, 0.0, 0.0, world_size, None).metrics()
            taken.append(packed + time.thread_time() - began)
        taken.sort()
        lines.append(f"| {world_size} | {taken[STEPS // 2] * 1e6:.0f} | {taken[-3] * 1e6:.0f} |")
    source = "From calls of the loop's functions in one process: so many ranks are not to be had."
    sides.record(args.results, "watching all ranks", "watching all ranks", source, sides.typed("monitoring.py"), lines)


if __name__ == "__main__":
    main()
