"""Limits of time and memory for a chat template: its author is not this machine's user, and Jinja's sandbox bounds neither.

The time is that of the processor, so that a busy machine refuses no template. Memory is the address space of the process.
"""

from __future__ import annotations

import functools
import itertools
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A conversation takes microseconds to milliseconds.
MAX_CPU_S = 20.0
MAX_BYTES = 4 << 30
# Reading the size of the process takes longer than most conversations.
_CALLS_PER_READ = 256
_calls = itertools.count()


class LimitReached(Exception):
    """A template takes too much time or memory; the message says which."""


@contextmanager
def limited() -> Iterator[None]:
    """Run this block for MAX_CPU_S and in MAX_BYTES of additional memory at most; only the main thread can be limited.

    Raises:
        LimitReached: where it takes more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGVTALRM) is not _raise:
        signal.signal(signal.SIGVTALRM, _raise)
    before = resource.getrlimit(resource.RLIMIT_AS)
    allowed = _num_address_bytes(next(_calls) // _CALLS_PER_READ) + MAX_BYTES
    within = [allowed if limit == resource.RLIM_INFINITY else min(allowed, limit) for limit in before]
    resource.setrlimit(resource.RLIMIT_AS, (within[0], before[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_S)
    try:
        yield
    except MemoryError:
        raise LimitReached(f"takes more than {MAX_BYTES >> 30} GiB of memory for one conversation") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _raise(*_: Any) -> None:
    raise LimitReached(f"takes more than {MAX_CPU_S:g} s for one conversation")


@functools.lru_cache(maxsize=1)
def _num_address_bytes(_time: int) -> int:
    """Return the address space of this process; equal arguments get the value of the first of them."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read(64).split()[0]) * os.sysconf("SC_PAGE_SIZE")
