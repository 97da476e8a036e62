"""Ranks that wait in a collective over gloo, as in an NCCL hang; tests/forked_ranks.py runs them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.worker.ranks.flight_recorder import answer_requests

DEADLINE_S = 120


def wait_for_go(folder: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while not Path(folder, "go").exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def record_on_a_gpu(folder: str) -> None:
    """All-reduce over NCCL on one rank, which ends at once; torch's own thread answers dump requests."""
    dist.init_process_group("nccl", init_method=f"file://{os.environ['RENDEZVOUS']}", rank=0, world_size=1)
    numbers = torch.ones(1024, device="cuda")
    dist.all_reduce(numbers)
    torch.cuda.synchronize()
    Path(folder, "ready-0").touch()
    wait_for_go(folder)
    dist.destroy_process_group()


def wait_without(absent: int, folder: str) -> None:
    """All-reduce twice, all-gather, all-reduce again; the rank `absent` joins the all-gather only once the file `go` exists."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['RENDEZVOUS']}", rank=rank, world_size=world_size)
    answer_requests(os.environ, rank)
    numbers = torch.ones(1024)
    dist.all_reduce(numbers)
    # A separate process group, in which no rank waits.
    dist.all_reduce(numbers, group=dist.new_group(list(range(world_size))))
    dist.all_reduce(numbers)
    Path(folder, f"ready-{rank}").touch()
    if rank == absent:
        wait_for_go(folder)
    gathered = [torch.empty(1024) for _ in range(world_size)]
    dist.all_gather(gathered, numbers)
    dist.all_reduce(numbers)
    dist.destroy_process_group()
