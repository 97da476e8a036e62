"""Binds a rank to the CPUs next to its GPU: copies between main memory and a GPU of another socket take about twice as long."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_SYSFS = Path("/sys")


def bind_to_gpu(local_rank: int) -> frozenset[int]:
    """Bind the calling thread, and those that it starts, to the CPUs next to the GPU `local_rank`; return them, empty if unknown.

    CPUs that this process may not use are left out. Where none is left, nothing changes.
    """
    import torch

    properties = torch.cuda.get_device_properties(local_rank)
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    cpus = cpus_near(address) & os.sched_getaffinity(0)
    if cpus:
        with suppress(OSError):
            os.sched_setaffinity(0, cpus)
    return frozenset(cpus)


def cpus_near(address: str, sysfs: Path = _SYSFS) -> set[int]:
    """Return the CPUs of the NUMA node of a PCI device, empty where the machine has one node, or does not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
        return _parse((sysfs / f"devices/system/node/node{node}/cpulist").read_text()) if node >= 0 else set()
    except (OSError, ValueError):
        return set()


def _parse(text: str) -> set[int]:
    """Return the numbers of a list such as 0-3,8-11."""
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}
