"""All-reduce bandwidth between the ranks, measured before the model loads."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from launcher.plan.launch_plan import Topology

# The speed of Ethernet with TCP: gathering the weights of a layer would take longer than computing it.
_SLOW_GB_PER_S = 5.0
# With more ranks, latency dominates an all-reduce of this size on any network.
_MOST_RANKS = 256
_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}


def measure_bus_bandwidth(device: torch.device, repeats: int = 3) -> float:
    """Return the bus bandwidth in GB/s (10^9 bytes) of an all-reduce over all ranks: 64 MiB on GPUs, 1 MiB on CPUs.

    Collective; all ranks return the same number: that of the slowest rank's median of `repeats`, after a warm-up. The process
    group's timeout is the deadline.

    As in nccl-tests, algbw = bytes / seconds and busbw = algbw * 2(n-1)/n for n ranks, which is comparable with the speed of the
    hardware for any n. With one rank it is 0. https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    buffer = torch.zeros(_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    _seconds(buffer)
    seconds = torch.tensor(statistics.median(_seconds(buffer) for _ in range(repeats)), device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    num_ranks = dist.get_world_size()
    return buffer.nbytes / seconds.item() * 2 * (num_ranks - 1) / num_ranks / 1e9


def bandwidth_warning(topology: Topology, gb_per_s: float) -> str:
    """Return advice to append to the measurement if GPUs of several nodes seem to use a slow network; empty otherwise."""
    if topology.device != "cuda" or topology.nodes == 1 or topology.world_size > _MOST_RANKS or gb_per_s >= _SLOW_GB_PER_S:
        return ""
    return (
        f", below {_SLOW_GB_PER_S:g} GB/s: training will wait for the network; set NCCL_DEBUG=INFO to see which one NCCL chose, "
        "and check that the container sees InfiniBand or RoCE"
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
