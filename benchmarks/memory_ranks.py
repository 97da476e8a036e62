"""One rank of benchmarks/memory_plan.py: a plan's engine under LiveBytes, with random ids. Rank 0 prints one JSON object.

python -m torch.distributed.run --nproc-per-node N benchmarks/memory_ranks.py PLAN.json
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch._dynamo  # a lazy import of it inside zero.Init fails
import torch.distributed as dist
from live_bytes import LiveBytes

from launcher.distributed import RankInfo
from launcher.plan.launch_plan import LaunchPlan
from launcher.train.engine import build_engine, import_muon, lock_builds

_STEPS = 3


def main(path: str) -> None:
    import deepspeed

    plan = LaunchPlan.load(path)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    lock_builds()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    import_muon()
    rows, length = plan.batch.micro_batch_size, plan.config.data.max_length
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, plan.model.vocab_size, (rows, length), generator=generator)
    # Two packed documents per row.
    positions = torch.arange(length).remainder(length // 2).expand(rows, length).contiguous()
    peaks = {"forward": 0, "backward": 0, "step": 0}
    with LiveBytes((ids, positions)) as counted:
        engine, _ = build_engine(plan, RankInfo(rank, rank, size, 1))
        states = counted.live
        counted.restart_peak()
        for _ in range(_STEPS):
            for _ in range(plan.batch.accumulation):
                loss = engine(ids, positions, ids)
                peaks["forward"] = counted.restart_peak()
                engine.backward(loss, scale_wrt_gas=False)
                peaks["backward"] = counted.restart_peak()
                engine.step()
                peaks["step"] = counted.restart_peak()
    if rank == 0:
        print(json.dumps({"states": states, **peaks}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
