"""Limits of the machine or job behind a failure: memory, processes, open files and disk space.

The kernel kills processes for lack of memory, and counts them in the counters of control groups and of the machine.
A process that starts ranks records the counters. If it is killed itself, whoever notices on the same machine compares them.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import LauncherError, causes
from launcher.hardware import full_disk
from launcher.plan.quantities import format_size
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records
from launcher.runs.locks import pid_namespace

OWN_CGROUPS, VMSTAT = Path("/proc/self/cgroup"), Path("/proc/vmstat")
# Keyed by the controllers in a line of /proc/self/cgroup (https://man7.org/linux/man-pages/man7/cgroups.7.html); v2 names none.
# The file with the counter of killed processes, and the file with the limit on memory.
_CGROUPS = Path("/sys/fs/cgroup")
_FILES_OF = {"": ("memory.events", "memory.max"), "memory": ("memory.oom_control", "memory.limit_in_bytes")}
# Version 1 shows "no limit" as the largest multiple of the page size.
_NO_LIMIT = 2**60
_DISK = re.compile(r"No space left on device|Disk quota exceeded|not enough free disk space", re.IGNORECASE)
_FILES = re.compile(r"Too many open files", re.IGNORECASE)
_PROCESSES = re.compile(r"can't start new thread|pthread_create|^BlockingIOError", re.IGNORECASE | re.MULTILINE)
_MEMORY = re.compile(r"\bMemoryError\b|Cannot allocate memory|can't allocate memory", re.IGNORECASE)
_PATH = re.compile(r"(?:^|[\s'\"])(/[^\s'\":,]+)")


@dataclass(frozen=True)
class Counter:
    """How many processes the kernel has killed for lack of memory: a line of `file`. `limit_file` is empty for the machine's."""

    file: str
    limit_file: str
    value: int = 0

    def read_again(self) -> Counter:
        """Return the counter with its current value, or unchanged if the control group is gone."""
        with suppress(OSError):
            if match := re.search(r"^oom_kill (\d+)$", Path(self.file).read_text(), re.MULTILINE):
                return replace(self, value=int(match[1]))
        return self

    @property
    def limit(self) -> int | None:
        # `max` is not a number, and the root has no limit.
        with suppress(OSError, ValueError):
            limit = int(Path(self.limit_file).read_text()) if self.limit_file else _NO_LIMIT
            return limit if limit < _NO_LIMIT else None
        return None


@dataclass(frozen=True)
class LimitEvents:
    """The counters of a process's control groups, from its own up to the root, and of the machine."""

    counters: tuple[Counter, ...] = ()

    @classmethod
    def read(cls) -> LimitEvents:
        """Read the counters of this process; unreadable ones count as 0."""
        counters = []
        with suppress(OSError, ValueError):
            for line in OWN_CGROUPS.read_text().splitlines():
                _, controllers, group = line.split(":", 2)
                if controllers not in _FILES_OF:
                    continue
                file, limit = _FILES_OF[controllers]
                for level in (Path(group), *Path(group).parents):
                    folder = _CGROUPS / controllers / level.relative_to("/")
                    if (folder / file).is_file():
                        counters.append(Counter(str(folder / file), str(folder / limit)))
        return cls((*counters, Counter(str(VMSTAT), ""))).read_again()

    def read_again(self) -> LimitEvents:
        """Read the same counters again; counters of control groups that are gone keep their values."""
        return replace(self, counters=tuple(counter.read_again() for counter in self.counters))

    @property
    def memory_bytes(self) -> int | None:
        """The lowest limit on memory, or None if there is none."""
        return min((limit for counter in self.counters if (limit := counter.limit) is not None), default=None)

    def cause_since(self, earlier: LimitEvents) -> str:
        """Return the limit that was enforced since `earlier`, as the beginning of a message; empty if none was."""
        before = {counter.file: counter.value for counter in earlier.counters}
        judged = [counter for counter in self.counters if not counter.limit_file]
        # Of memory, the lowest control group that still exists: groups above it also count the processes of other jobs (version
        # 2). Slurm and systemd remove a group with its last process: then the group above is used, unless other groups share it
        # and its memory has no limit.
        of_memory = [counter for counter in self.counters if counter.limit_file]
        for lowest in [counter for counter in of_memory if Path(counter.file).is_file()][:1]:
            is_shared = False
            with suppress(OSError):
                is_shared = any((path / "cgroup.procs").exists() for path in Path(lowest.file).parent.iterdir())
            if lowest is of_memory[0] or lowest.limit is not None or not is_shared:
                judged.append(lowest)
        grown = [counter for counter in judged if counter.value > before.get(counter.file, 0)]
        if any(counter.limit_file for counter in grown):
            limit = "" if self.memory_bytes is None else f" of {format_size(self.memory_bytes)}"
            return f"the memory limit{limit} of this job or container was exceeded, and the kernel killed a process"
        if grown:
            return "the node ran out of memory, and the kernel killed a process"
        return ""


@dataclass(frozen=True)
class LimitRecord:
    """limits-NNNNN.json: the counters of killed processes when a node's agent started; `space` is its boot and PID namespace."""

    space: str
    events: LimitEvents


def record_limits(run: RunDir, attempt: int, node: int) -> None:
    """Record the counters of this process, a node's agent; under Ray, one record per worker, named by its rank."""
    # Leave out the machine's own counter: until the comparison, it also counts other processes. A control group counts its own
    # processes wherever memory ran out.
    counters = tuple(counter for counter in LimitEvents.read().counters if counter.limit_file)
    # Only messages depend on it.
    with suppress(OSError):
        json_records.write(_limits_file(run, attempt, node), LimitRecord(pid_namespace(), LimitEvents(counters)))


def limit_that_killed_agents(run: RunDir, attempt: int, nodes: Iterable[int]) -> str:
    """Return the memory limit that was exceeded after the agents of `nodes` started, for agents that were killed.

    Empty if none was, if the agents left no counters, or if they ran on other machines or in other containers.
    """
    for node in nodes:
        with suppress(LauncherError):
            record = json_records.read_if_present(LimitRecord, _limits_file(run, attempt, node))
            if record is None or record.space != pid_namespace():
                continue
            if cause := record.events.read_again().cause_since(record.events):
                return cause
    return ""


def _limits_file(run: RunDir, attempt: int, node: int) -> Path:
    return run.attempt(attempt) / f"limits-{node:05d}.json"


def cause_of(error: BaseException, folder: Path) -> str:
    """Return the limit behind an exception in this process, as the beginning of a message; empty if none is recognized.

    `folder` is on the disk to measure if the exception names no path.
    """
    text = "\n".join(f"{type(link).__name__}: {link}" for link in causes(error, with_suppressed=False))
    if _DISK.search(text):
        named = [path for path in (str(getattr(error, "filename", "")), *_PATH.findall(text)) if path.startswith("/")]
        return full_disk(Path(named[0]) if named else folder)
    if _FILES.search(text):
        return f"the limit of {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} open files (ulimit -n) was reached"
    if _PROCESSES.search(text):
        return "the limit on processes and threads (pids.max, ulimit -u) was reached"
    if _MEMORY.search(text):
        limit_bytes = LimitEvents.read().memory_bytes
        limit = "" if limit_bytes is None else f" (limit: {format_size(limit_bytes)})"
        return f"there was no main memory left{limit}"
    return ""
