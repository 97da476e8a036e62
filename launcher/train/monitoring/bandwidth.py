"""All-reduce bandwidth between the ranks, measured before the model loads."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from launcher.plan.deepspeed import gathered_width, reduced_width
from launcher.plan.gpu_types import lookup
from launcher.plan.launch_plan import LaunchPlan

# The speed of TCP over Ethernet, too slow for every model: the limit if the GPU type is unknown.
_SLOW_GB_PER_S = 5.0
# Assumed share of a GPU's peak that a whole pass reaches.
_PEAK_SHARE = 0.48
# FLOPs per parameter and token, with recomputed layers.
_FLOPS = 8
# With more ranks, latency dominates an all-reduce of this size on any network.
_MOST_RANKS = 1024
# On GPUs, enough to saturate fast networks.
_BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}


def measure_bus_bandwidth(device: torch.device, repeats: int = 3) -> float:
    """Return the bus bandwidth in GB/s (10^9 bytes) of an all-reduce over all ranks: 256 MiB on GPUs, 1 MiB on CPUs.

    Collective. All ranks return the same number: the slowest rank's median of `repeats`, after a warm-up. The process group's
    timeout is the deadline.

    As in nccl-tests, algbw = bytes / seconds and busbw = algbw * 2(n-1)/n for n ranks, which can be compared with the hardware's
    speed for any n. With one rank it is 0. https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    buffer = torch.zeros(_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    _time_all_reduce(buffer)
    seconds = torch.tensor(statistics.median(_time_all_reduce(buffer) for _ in range(repeats)), device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    num_ranks = dist.get_world_size()
    return buffer.nbytes / seconds.item() * 2 * (num_ranks - 1) / num_ranks / 1e9


def needed_gb_per_s(plan: LaunchPlan) -> float:
    """Return the bus bandwidth at which a micro-batch's communication takes as long as its arithmetic: (B / 8) F / T.

    B are the bytes that cross the network per parameter: the weight for the forward and the backward pass, unless nodes hold a
    second copy (hpZ), and the gradient. F are the FLOP/s that a GPU reaches, T the tokens of a forward pass.
    """
    gpu, tokens = lookup(plan.gpu_name), plan.batch.micro_batch_size * plan.config.data.max_length
    if gpu is None:
        return _SLOW_GB_PER_S
    dtype, topology = plan.config.model.dtype, plan.topology
    is_copied = 1 < plan.deepspeed["zero_optimization"].get("zero_hpz_partition_size", 1) <= topology.ranks_per_node
    num_bytes = gathered_width(plan.deepspeed, dtype) * (1 if is_copied else 2) + reduced_width(plan.deepspeed, dtype)
    flops = _PEAK_SHARE * (gpu.peak_tflops("fp32" if dtype == "fp32" else "bf16") or gpu.bf16) * 1e12
    return max(_SLOW_GB_PER_S, num_bytes / _FLOPS * flops / tokens / 1e9)


def bandwidth_warning(plan: LaunchPlan, gb_per_s: float) -> str:
    """Return advice to append to the measurement if GPUs of several nodes will wait for their network; empty otherwise."""
    topology, needed = plan.topology, needed_gb_per_s(plan)
    if topology.device != "cuda" or topology.nodes == 1 or topology.world_size > _MOST_RANKS or gb_per_s >= needed:
        return ""
    tokens = plan.batch.micro_batch_size * plan.config.data.max_length
    return (
        f", below the {needed:.0f} GB/s that {tokens:,} tokens of a forward pass need: training will wait for the network; set "
        "NCCL_DEBUG=INFO to see which one NCCL chose, check that the container sees InfiniBand or RoCE, or raise "
        "train.micro_batch_size"
    )


def _time_all_reduce(buffer: torch.Tensor) -> float:
    _synchronize(buffer.device)
    started = time.perf_counter()
    dist.all_reduce(buffer)
    _synchronize(buffer.device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
