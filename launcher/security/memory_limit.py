"""Bounds the memory that a block of code in this process can take, and explains the end of a process that took too much time."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.errors import Problem

# The process has one limit: two threads would each restore the value that the other has set.
_lock = threading.RLock()


@contextmanager
def bounded_memory(num_bytes: int) -> Iterator[None]:
    """Limit this process's further allocations; allocations above the limit fail, as on a machine without free memory.

    Blocks in other threads wait for this one.
    """
    with _lock:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        used = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData:"))
        limits = [used + num_bytes, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
        try:
            yield
        finally:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def explain_end(exit_code: int | None) -> Problem | None:
    """Return the problem if a chat template's limit of time ended a process with this code (-N: signal N), else None."""
    if exit_code != -signal.SIGPROF:
        return None
    message = "a chat template does not end, so the process that ran it was stopped"
    remedy = (
        "look for operations on very long texts or lists in the template, and set data.chat_template to a file with one that "
    )
    return Problem(message, "data.chat_template", remedy=f"{remedy}you trust")
