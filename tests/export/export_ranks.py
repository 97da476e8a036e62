"""A rank that exports at the end of a run, writing its share over gloo; tests/forked_ranks.py runs it."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.distributed import RankInfo
from launcher.errors import ExportError
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.tracker import Composite
from launcher.train import finish
from launcher.train.engine import leave_process_group


class Printer:
    def event(self, kind: str, text: str, step: int | None = None, **fields: object) -> None:
        print(f"{kind}: {text}", flush=True)


def main(plan_path: str, checkpoint: str, limited: int) -> None:
    """Export `checkpoint`. The rank `limited` cannot write files over 16 KiB, as on a disk that fills up; -1 limits no rank.

    Rank 0 completes the folder and prints each event. On a failure every rank prints it and exits with 3.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['RENDEZVOUS']}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    plan = LaunchPlan.load(plan_path)
    task_of = finish._export_task
    finish._export_task = lambda *parts: replace(task_of(*parts), max_file_bytes=20_000)
    if rank == limited:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, resource.RLIM_INFINITY))
    try:
        rank_info = RankInfo(rank, rank, world_size, attempt=1)
        finish.write_weights(plan, rank_info, Path(checkpoint), torch.device("cpu"), Composite([]))
        leave_process_group()
        if rank == 0:
            finish.finish(plan, Path(checkpoint), Composite([Printer()]), on_exported=lambda *_: None)
    except ExportError as error:
        print(error, flush=True)
        assert not dist.is_initialized()
        sys.exit(3)
