"""Binds a rank to the CPUs next to its GPU: copies between main memory and a GPU on another socket take about twice as long."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_SYSFS = Path("/sys")
# Threads of a rank that computes nothing on CPUs: the loop, autograd, NCCL's, and the one that copies states for a save.
_GPU_RANK_THREADS = 4


def bind_to_gpu(local_rank: int, num_ranks: int, num_threads: int) -> None:
    """Bind the calling thread, and the threads it starts, to the CPUs next to GPU `local_rank`, if `choose_cpus` returns any.

    Each of this machine's `num_ranks` ranks keeps `num_threads` threads busy.
    """
    import torch

    # Another rank's GPU may be hidden from this one.
    num_gpus = max(local_rank + 1, min(num_ranks, torch.cuda.device_count()))
    near = [cpus_near(_address(torch.cuda.get_device_properties(i))) for i in range(num_gpus)]
    if cpus := choose_cpus(near, local_rank, os.sched_getaffinity(0), num_threads):
        with suppress(OSError):
            os.sched_setaffinity(0, cpus)


def choose_cpus(near: Sequence[set[int]], local_rank: int, allowed: set[int], num_threads: int) -> set[int]:
    """Return the CPUs to bind a rank to: those next to its GPU that this process may use. Empty means no binding.

    They must be enough for the threads of all ranks next to them: remote memory costs less than a shared CPU.
    `near` holds the CPUs next to each rank's GPU on this machine; a set is empty if they are not known.
    """
    cpus = near[local_rank] & allowed
    return cpus if len(cpus) >= num_threads * near.count(near[local_rank]) else set()


def num_busy_threads(environ: Mapping[str, str], steps_on_cpu: bool) -> int:
    """Return the threads for which a rank on a GPU needs CPUs: the first number in OMP_NUM_THREADS, or 1 if it is not set.

    These are at most a few, unless the optimizer steps on the CPU: the agent divides all CPUs of the machine over its ranks, and
    the NUMA nodes next to GPUs may have fewer.
    """
    first = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    num_threads = int(first) if first.isdecimal() else 1
    return num_threads if steps_on_cpu else min(num_threads, _GPU_RANK_THREADS)


def _address(properties: Any) -> str:
    """Return the PCI address of a GPU as the kernel writes it."""
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def cpus_near(address: str, sysfs: Path = _SYSFS) -> set[int]:
    """Return the CPUs of a PCI device's NUMA node; empty if the machine has one node or does not report it."""
    try:
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
        return _parse((sysfs / f"devices/system/node/node{node}/cpulist").read_text()) if node >= 0 else set()
    except (OSError, ValueError):
        return set()


def _parse(text: str) -> set[int]:
    """Return the numbers of a list such as 0-3,8-11."""
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}
