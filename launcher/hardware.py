"""What this machine has; who asks for it on the submit side need not load what reads models and data."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from launcher.plan.launch_plan import DeviceFacts


@functools.cache
def device() -> DeviceFacts:
    """This machine's accelerators as nvidia-smi sees them, or its CPU."""
    from launcher.plan.launch_plan import DeviceFacts

    host = round(psutil.virtual_memory().total / 2**30, 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") and visible != "":
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        query += ["-i", visible] if visible is not None else []
        try:
            lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            lines = []
        rows = [line.rsplit(",", 1) for line in lines if "," in line]
        if rows:
            name, memory = rows[0]
            return DeviceFacts(
                kind="cuda", name=name.strip(), count=len(rows), memory_gib=round(float(memory) / 1024, 1), host_memory_gib=host
            )
    return DeviceFacts(kind="cpu", name=_cpu_name(), count=psutil.cpu_count() or 1, host_memory_gib=host)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"
