"""The limit behind an exception: memory, processes, open files or disk space."""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from launcher.clusters.cgroups import LimitEvents
from launcher.errors import causes
from launcher.plan.quantities import format_size

_DISK = re.compile(r"No space left on device|Disk quota exceeded|not enough free disk space", re.IGNORECASE)
_FILES = re.compile(r"Too many open files", re.IGNORECASE)
_PROCESSES = re.compile(r"can't start new thread|pthread_create|^BlockingIOError", re.IGNORECASE | re.MULTILINE)
_MEMORY = re.compile(r"\bMemoryError\b|Cannot allocate memory|can't allocate memory", re.IGNORECASE)
_PATH = re.compile(r"(?:^|[\s'\"])(/[^\s'\":,]+)")


def cause_of(error: BaseException, folder: Path) -> str:
    """Return the limit behind an exception in this process, as the beginning of a message; empty if none is recognized.

    `folder` is on the disk to measure if the exception names no path.
    """
    text = "\n".join(f"{type(link).__name__}: {link}" for link in causes(error, with_suppressed=False))
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
    """Describe the full disk of `path`: its free and total space."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return f"the disk of {path} is full"
    return f"the disk of {path} is full ({format_size(usage.free)} of {format_size(usage.total)} free)"


def _existing(paths: Iterable[object], otherwise: Path) -> Path:
    """Return the nearest existing folder of the first absolute path, or `otherwise` if there is no absolute path."""
    for path in paths:
        if isinstance(path, str) and path.startswith("/"):
            with suppress(OSError):
                return next(folder for folder in Path(path).parents if folder.is_dir())
    return otherwise
