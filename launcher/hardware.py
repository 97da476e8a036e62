"""The devices of this machine: its GPUs, or its CPU. Imports neither models nor data."""

from __future__ import annotations

import functools
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import nvml
from launcher.nvml import GpuInfo

if TYPE_CHECKING:
    from launcher.plan.launch_plan import DeviceFacts

# Values of CUDA_VISIBLE_DEVICES that select the CPU.
_CPU_CHOSEN = ("", "-1")


@functools.cache
def device() -> DeviceFacts:
    """Return this machine's GPUs as the NVIDIA driver sees them, or its CPU."""
    from launcher.plan.launch_plan import DeviceFacts

    host_memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    gpus: list[GpuInfo] = []
    problem = ""
    if may_use_gpus():
        try:
            gpus = nvml.list_gpus()
        except nvml.NvmlError as error:
            problem = str(error)
    if gpus:
        memory_gib = gpus[0].memory_gib
        return DeviceFacts(
            kind="cuda",
            name=gpus[0].name,
            count=len(gpus),
            memory_gib=None if memory_gib is None else round(memory_gib, 1),
            host_memory_gib=host_memory_gib,
        )
    count, name = os.cpu_count() or 1, platform.processor() or "CPU"
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return DeviceFacts(kind="cpu", name=name, count=count, host_memory_gib=host_memory_gib, problem=problem)


def may_use_gpus() -> bool:
    """Return whether NVIDIA's driver is present and the user has not hidden all GPUs."""
    return nvml.has_driver() and os.environ.get("CUDA_VISIBLE_DEVICES") not in _CPU_CHOSEN


@functools.cache
def has_fast_bf16() -> bool:
    """Return True if PyTorch computes bf16 with this CPU's vector instructions: oneDNN needs AVX-512, AMX or Arm's bf16."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return {"avx512bw", "avx512vl", "avx512dq"} <= words or not words.isdisjoint({"amx_bf16", "avx_ne_convert", "bf16"})
