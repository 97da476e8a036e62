"""How fast the ranks talk to each other: one all-reduce, timed before the model loads."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from launcher.plan.launch_plan import Topology

# Of Ethernet with TCP, or less: gathering the weights of a layer would take longer than computing it.
_SLOW_GB_PER_S = 5.0
# Among more of them an all-reduce of this size takes its time on any network.
_MOST_RANKS = 256
_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}


def measure(device: torch.device, repeats: int = 3) -> float:
    """Bus bandwidth in GB/s (10^9 bytes) of an all-reduce over all ranks: 64 MiB on GPUs, 1 MiB on CPUs.

    As in nccl-tests: algbw = bytes / seconds and, for an all-reduce over n ranks, busbw = algbw * 2(n-1)/n, which can be
    compared with the speed of the hardware whatever n is; of one rank it is 0.
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md

    Collective. The time is the median of `repeats` after one that opens the connections, on the slowest rank, so that all
    ranks return the same number. The process group's timeout is the deadline.
    """
    buffer = torch.zeros(_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    _seconds(buffer)
    seconds = torch.tensor(statistics.median(_seconds(buffer) for _ in range(repeats)), device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    num_ranks = dist.get_world_size()
    return buffer.nbytes / seconds.item() * 2 * (num_ranks - 1) / num_ranks / 1e9


def doubt(topology: Topology, gb_per_s: float) -> str:
    """What a person should look at where GPUs of several nodes talk so slowly that NCCL cannot have found their fast network."""
    if topology.device != "cuda" or topology.nodes == 1 or topology.world_size > _MOST_RANKS or gb_per_s >= _SLOW_GB_PER_S:
        return ""
    return (
        f", below {_SLOW_GB_PER_S:g} GB/s: training will wait for the network; NCCL_DEBUG=INFO shows which one NCCL has chosen, "
        "look whether InfiniBand or RoCE is there and seen by the container"
    )


def _seconds(buffer: torch.Tensor) -> float:
    _synchronize(buffer.device)
    started = time.perf_counter()
    dist.all_reduce(buffer)
    _synchronize(buffer.device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
