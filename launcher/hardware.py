"""This machine: its GPUs or its CPU, its free memory, its full disks, and the tools with which kernels are built.

Imports neither torch nor data.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import nvml
from launcher.errors import Problem
from launcher.nvml import GpuInfo
from launcher.plan.quantities import format_size

if TYPE_CHECKING:
    from launcher.plan.launch_plan import DeviceFacts

# Values of CUDA_VISIBLE_DEVICES that select the CPU.
_CPU_CHOSEN = ("", "-1")
# The disk or the user's quota is full, or the file exceeds the process's size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OWN_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_HEADER = "Python.h"
# By device kind: the compiler for kernels, the variable that names one, the commands that the package tries if it is unset, and
# the variable with header folders.
_COMPILERS = {
    "cuda": ("C compiler", "CC", ("gcc", "clang"), "C_INCLUDE_PATH"),
    "cpu": ("C++ compiler", "CXX", ("g++",), "CPLUS_INCLUDE_PATH"),
}


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


def available_bytes() -> int:
    """Return the bytes of host memory left to this machine, or to the container or job that the process is in."""
    import psutil

    available = [psutil.virtual_memory().available]
    try:
        # Version 2 of control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html
        group = CGROUPS / OWN_CGROUP.read_text().rpartition("::/")[2].strip()
    except OSError:
        return available[0]
    for folder in (group, *group.parents):
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        except (OSError, ValueError):
            # No limit here.
            continue
        with suppress(OSError):
            # The page cache counts as used but can be reclaimed.
            if match := re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE):
                used -= int(match[1])
        available.append(max(0, limit - used))
    return min(available)


def is_full(error: BaseException) -> bool:
    """Return whether there is no space left for a file."""
    return isinstance(error, OSError) and error.errno in _FULL


def full_disk(path: Path) -> str:
    """Describe the full disk of a file or folder: a folder on it, and its free and total space."""
    try:
        folder = next(folder for folder in (path, *path.parents) if folder.is_dir())
        usage = shutil.disk_usage(folder)
    except OSError:
        return f"the disk of {path} is full"
    return f"the disk of {folder} is full ({format_size(usage.free)} of {format_size(usage.total)} free)"


def name_full_disk(message: str, error: BaseException) -> str:
    """Return a message about a file that could not be written; begins with the full disk if that is why."""
    return f"{full_disk(Path(error.filename or '.'))}: {message}" if isinstance(error, OSError) and is_full(error) else message


def missing_build_tools(device: str) -> list[Problem]:
    """Return a problem for a missing compiler and one for missing headers that kernels for a device (cuda or cpu) need here.

    On GPUs, Triton compiles a C launcher for each kernel of Liger and of torch.compile. On CPUs, torch.compile generates C++.
    """
    compiler, variable, commands, folders = _COMPILERS[device]
    problems = []
    # The package calls whatever the variable names, and looks for no other compiler.
    named = shlex.split(os.environ.get(variable, ""))[:1]
    if not any(map(shutil.which, named or commands)):
        looked_for = f"{variable}={named[0]}" if named else " and ".join(commands)
        remedy = f"apt-get install {commands[0]}" + (f", and unset {variable}" if named else "")
        problems.append(Problem(f"no {compiler} is found", value=looked_for, remedy=remedy))
    variables = (os.environ.get(name, "") for name in ("CPATH", folders))
    given = [folder for value in variables for folder in value.split(os.pathsep) if folder]
    if not any(Path(folder, _HEADER).is_file() for folder in (_include_folder(), *given)):
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        remedy = f"apt-get install {package}, or use a Python that has its headers, such as one from uv or conda"
        problems.append(Problem(f"Python's headers are not installed ({_HEADER})", value=_include_folder(), remedy=remedy))
    return problems


def _include_folder() -> str:
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme for packages installed by pip has no headers.
    return sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
