"""CPU time that rank 0 spends per step on monitoring all ranks, in addition to each step's all-reduce.

    python benchmarks/monitoring.py

Calls the loop's functions in one process, without communication: packing this rank's statistics, unpacking those of all ranks,
metrics, alerts, goodput. Writes a table into RESULTS.md.
"""

from __future__ import annotations

import time

import sides
import torch

from launcher.tracking.goodput import Breakdown
from launcher.train.monitoring import step_metrics
from launcher.train.monitoring.anomalies import AnomalyDetector
from launcher.train.monitoring.step_metrics import NUM_VALUES, DeviceReadings, RankStats

STEPS = 300
READINGS = DeviceReadings(5, 0.97, 0.8, 650, 70, 0, 0, 0.3, 0.4)


def main() -> None:
    args = sides.parser(__doc__, rounds=None).parse_args()
    lines = ["| ranks | rank 0's CPU time for each step that is logged, us | the slowest of 100, us |", "|---|---|---|"]
    for world_size in (2, 64, 512):
        detector, spent = AnomalyDetector("cuda", "runs/one"), Breakdown(1e5, 9e4)
        others = [
            value for rank in range(world_size) for value in RankStats(2.0, 1e-4, 1e-6 + rank * 1e-12, device=READINGS).values()
        ]
        taken = []
        for step in range(STEPS):
            began = time.thread_time()
            values = [0.0] * (NUM_VALUES * world_size)
            values[:NUM_VALUES] = RankStats(2.0, 1e-4, 1e-6, device=READINGS).values()
            shared = torch.tensor([0.0] * 4 + values, dtype=torch.float64)
            packed = time.thread_time() - began
            shared[4:] = torch.tensor(others, dtype=torch.float64)
            began = time.thread_time()
            ranks = step_metrics.unpack_ranks(shared.tolist()[4:])
            works = step_metrics.estimate_work(ranks)
            step_metrics.aggregate_metrics(ranks, works)
            list(detector.faults(ranks, ["n"] * world_size))
            list(detector.stragglers(works, ["n"] * world_size))
            detector.step(2.0 - step * 1e-6, 1000.0)
            spent.add_training(step, 0.0, 0.0, world_size, None).metrics()
            taken.append(packed + time.thread_time() - began)
        taken.sort()
        lines.append(f"| {world_size} | {taken[STEPS // 2] * 1e6:.0f} | {taken[-3] * 1e6:.0f} |")
    source = "From calls to the loop's functions in one process, because no machine with that many ranks is available."
    sides.record(args.results, "watching all ranks", "watching all ranks", source, sides.typed("monitoring.py"), lines)


if __name__ == "__main__":
    main()
