"""The identity of a process (its node and its rank), and the setup of a rank's process."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
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
# again. Weights and logits are larger than 32 MiB, the largest threshold that glibc accepts before this version.
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**26)}
_MMAP_THRESHOLD, _FORMER_MMAP_THRESHOLD = str(2**28), str(2**25)
_GLIBC_WITHOUT_LIMIT = (2, 35)


def allocator_defaults(environ: Mapping[str, str], device: str) -> dict[str, str]:
    """Return the memory allocator variables for `device` (cuda or cpu), except those that the user has set."""
    if device == "cpu":
        malloc = {"MALLOC_MMAP_THRESHOLD_": _mmap_threshold(*platform.libc_ver()), **_MALLOC}
        return {name: value for name, value in malloc.items() if name not in environ}
    name, value = _ALLOCATOR
    return {} if name in environ or _FORMER_ALLOCATOR in environ else {name: value}


def _mmap_threshold(library: str, version: str) -> str:
    """Return the mmap threshold, in bytes, for this C library."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return _MMAP_THRESHOLD if library == "glibc" and numbers >= _GLIBC_WITHOUT_LIMIT else _FORMER_MMAP_THRESHOLD


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
        """Return the title of a process, or None if the process is not a rank.

        Raises:
            psutil.Error: if the process has ended or cannot be read.
        """
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
