"""The identity of a process (its node and its rank), and the setup of a rank's process: memory, name, output, CPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from setproctitle import setproctitle, setthreadtitle

from launcher.errors import RunError

_TITLE = re.compile(r"launcher rank (\d+): (.+) (\d+)")
# Expandable segments: without them, packed rows of many lengths fragment GPU memory.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# An alternative name that torch also reads.
_FORMER_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
# With these, the C library reuses the memory of freed tensors; by default it returns it to the kernel, which clears each page
# again. glibc accepts this threshold since 2.35.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**26)}
_SYSFS = Path("/sys")
# Threads of a rank that computes nothing on CPUs: the loop, autograd, NCCL's, and the one that copies states for a save.
_GPU_RANK_THREADS = 4


def allocator_defaults(environ: Mapping[str, str], device: str) -> dict[str, str]:
    """Return the memory allocator variables for `device` (cuda or cpu), except those that the user has set."""
    if device == "cpu":
        return {name: value for name, value in _MALLOC.items() if name not in environ}
    name, value = _ALLOCATOR
    return {} if name in environ or _FORMER_ALLOCATOR in environ else {name: value}


@dataclass(frozen=True)
class RankEnv:
    """A rank's numbers as torch's elastic agent assigns them; `restart` counts the agent's restarts."""

    rank: int
    local_rank: int
    world_size: int
    restart: int

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> RankEnv:
        """Read RANK, LOCAL_RANK, WORLD_SIZE and TORCHELASTIC_RESTART_COUNT."""
        try:
            return cls(
                rank=int(environ["RANK"]),
                local_rank=int(environ["LOCAL_RANK"]),
                world_size=int(environ["WORLD_SIZE"]),
                restart=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            )
        except (KeyError, ValueError) as error:
            raise RunError(
                f"the environment of a rank is incomplete: {error}",
                where="launcher.worker.ranks.rank_main",
                remedy="ranks are started by the node's agent; start a run with: python -m launcher",
            ) from None


@dataclass(frozen=True)
class NodeInfo:
    """`node` is this node's index among the job's `hosts`; the other nodes reach it at `address` on `interface`."""

    node: int
    hosts: tuple[str, ...]
    address: str
    interface: str | None

    @property
    def is_head(self) -> bool:
        return self.node == 0


@dataclass(frozen=True)
class RankTitle:
    """A rank's title in `ps`, used to find its process: a forked rank has no command line of its own."""

    rank: int
    plan_path: str
    attempt: int

    @classmethod
    def of(cls, process: psutil.Process) -> RankTitle | None:
        """Return the title of a process, or None if the process is not a rank."""
        match = _TITLE.fullmatch(" ".join(process.cmdline()).strip())
        return cls(int(match[1]), match[2], int(match[3])) if match else None


def set_title(rank: int, plan_path: str, attempt: int) -> None:
    """Name this process in `ps`, `top` and `nvidia-smi`."""
    name_process(f"launcher rank {rank}: {plan_path} {attempt}", f"rank-{rank}")


def name_process(title: str, name: str) -> None:
    """Set the displayed command line, and the name in /proc/PID/stat.

    The name must not contain spaces: Slurm's proctrack/linuxproc splits that file at spaces, and would lose the process.
    """
    setproctitle(title)
    setthreadtitle(name)


def redirect_output(log: Path) -> None:
    """Redirect standard output and error of this process, including native libraries, to its log file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def bind_to_gpu(local_rank: int, num_ranks: int, num_threads: int) -> None:
    """Bind the calling thread, and the threads it starts, to the CPUs next to GPU `local_rank`, if `choose_cpus` returns any.

    Copies between main memory and a GPU on another socket take about twice as long.
    """
    import torch

    # Another rank's GPU may be hidden from this one.
    num_gpus = max(local_rank + 1, min(num_ranks, torch.cuda.device_count()))
    near = []
    for gpu in map(torch.cuda.get_device_properties, range(num_gpus)):
        # The PCI address as the kernel writes it.
        near.append(cpus_near(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"))
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


def cpus_near(address: str, sysfs: Path = _SYSFS) -> set[int]:
    """Return the CPUs of a PCI device's NUMA node; empty if the machine has one node or does not report it."""
    try:
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
        # A list such as 0-3,8-11.
        text = (sysfs / f"devices/system/node/node{node}/cpulist").read_text().strip() if node >= 0 else ""
        ranges = (part.partition("-") for part in text.split(",") if part)
        return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}
    except (OSError, ValueError):
        return set()
