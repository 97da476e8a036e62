"""Limits that end ranks: memory, processes, open files and disk space; from control groups, kernel counters, exceptions."""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.plan.disk import format_size

OWN_CGROUPS, VMSTAT = Path("/proc/self/cgroup"), Path("/proc/vmstat")
# By the controllers of a line of /proc/self/cgroup (https://man7.org/linux/man-pages/man7/cgroups.7.html); version 2 names none.
# For memory and for processes: the file with the counter, the counter, the file with the limit.
_CGROUPS = Path("/sys/fs/cgroup")
_MEMORY_V2 = ("memory.events", "oom_kill", "memory.max")
_MEMORY_V1 = ("memory.oom_control", "oom_kill", "memory.limit_in_bytes")
_PIDS = ("pids.events", "max", "pids.max")
# Version 1 shows "no limit" as the largest multiple of a page.
_NO_LIMIT = 2**60
_DISK = re.compile(r"No space left on device|Disk quota exceeded|not enough free disk space", re.IGNORECASE)
_FILES = re.compile(r"Too many open files", re.IGNORECASE)
_PROCESSES = re.compile(r"can't start new thread|pthread_create|^BlockingIOError", re.IGNORECASE | re.MULTILINE)
_MEMORY = re.compile(r"\bMemoryError\b|Cannot allocate memory|can't allocate memory", re.IGNORECASE)
_PATH = re.compile(r"(?:^|[\s'\"])(/[^\s'\":,]+)")


@dataclass(frozen=True)
class LimitEvents:
    """How often the kernel has enforced limits so far, and the lowest limits of this process's control groups.

    `oom_kills` counts processes that were killed in the control groups, `node_oom_kills` those of the whole machine;
    `refused_forks` counts processes and threads that were refused. `memory_bytes` and `num_processes` are None without a limit.
    """

    oom_kills: int = 0
    node_oom_kills: int = 0
    refused_forks: int = 0
    memory_bytes: int | None = None
    num_processes: int | None = None

    @classmethod
    def read(cls) -> LimitEvents:
        """Read the counters of this process's control groups and of the machine; what cannot be read counts as 0."""
        oom_kills = refused = 0
        memory: list[int] = []
        processes: list[int] = []
        for level, (file, name, limit_file) in _levels():
            if file == _PIDS[0]:
                refused += _counter(level / file, name)
                processes += _limit(level / limit_file)
            else:
                oom_kills += _counter(level / file, name)
                memory += _limit(level / limit_file)
        return cls(oom_kills, _counter(VMSTAT, "oom_kill"), refused, min(memory, default=None), min(processes, default=None))

    def cause_since(self, earlier: LimitEvents) -> str:
        """Return the limit that was enforced since `earlier`, as the beginning of a message; empty where none was."""
        if self.oom_kills > earlier.oom_kills:
            limit = "" if self.memory_bytes is None else f" of {format_size(self.memory_bytes)}"
            return f"the memory limit{limit} of this job or container was exceeded, and the kernel killed a process"
        if self.node_oom_kills > earlier.node_oom_kills:
            return "the node ran out of memory, and the kernel killed a process"
        if self.refused_forks > earlier.refused_forks:
            limit = "" if self.num_processes is None else f" of {self.num_processes:,}"
            return f"the limit{limit} on processes and threads of this job or container (pids.max) was reached"
        return ""


def cause_of(error: BaseException, folder: Path) -> str:
    """Return the limit behind an exception of this process, as the beginning of a message; empty where none is recognised.

    `folder` is on the disk to measure where the exception names no path.
    """
    text = "\n".join(f"{type(link).__name__}: {link}" for link in _chain(error))
    if _DISK.search(text):
        return full_disk(_existing([getattr(error, "filename", None), *_PATH.findall(text)], folder))
    if _FILES.search(text):
        return f"the limit of {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} open files (ulimit -n) was reached"
    if _PROCESSES.search(text):
        limits = [LimitEvents.read().num_processes, resource.getrlimit(resource.RLIMIT_NPROC)[0]]
        lowest = min((limit for limit in limits if limit is not None and limit >= 0), default=None)
        limit = "" if lowest is None else f" of {lowest:,}"
        return f"the limit{limit} on processes and threads (pids.max, ulimit -u) was reached"
    if _MEMORY.search(text):
        limit_bytes = LimitEvents.read().memory_bytes
        limit = "" if limit_bytes is None else f" (limit: {format_size(limit_bytes)})"
        return f"there was no main memory left{limit}"
    return ""


def full_disk(path: Path) -> str:
    """Describe the full disk of `path`: what is free, and of how much."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return f"the disk of {path} is full"
    return f"the disk of {path} is full ({format_size(usage.free)} of {format_size(usage.total)} free)"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception and those that it was raised from, as a traceback shows them."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _existing(paths: Iterable[object], otherwise: Path) -> Path:
    """Return the nearest existing folder of the first absolute path, `otherwise` without one."""
    for path in paths:
        if isinstance(path, str) and path.startswith("/"):
            with suppress(OSError):
                return next(folder for folder in Path(path).parents if folder.is_dir())
    return otherwise


def _levels() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folders of this process's control groups up to the root, with the files to read there."""
    with suppress(OSError, ValueError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            kinds = {"": (_MEMORY_V2, _PIDS), "memory": (_MEMORY_V1,), "pids": (_PIDS,)}
            folder = _CGROUPS / controllers
            for files in kinds.get(controllers, ()):
                for level in (Path(group), *Path(group).parents):
                    yield folder / level.relative_to("/"), files


def _counter(file: Path, name: str) -> int:
    with suppress(OSError):
        if match := re.search(rf"^{name} (\d+)$", file.read_text(), re.MULTILINE):
            return int(match[1])
    return 0


def _limit(file: Path) -> list[int]:
    # `max` is no number, and the root has no limit.
    with suppress(OSError, ValueError):
        limit = int(file.read_text())
        return [limit] if limit < _NO_LIMIT else []
    return []
