"""Limits time and memory for a chat template, and memory for a tokenizer: their author is not this machine's user.

Jinja's sandbox limits neither, and a few lines of tokenizer.json can double a text any number of times. Time is CPU time, so a
busy machine does not refuse a template. A template's memory is the address space of the process.

Python raises the error for the time between two of its own steps. Some steps in C take hours, such as counting in a long list of
long texts: they end the process.
"""

from __future__ import annotations

import functools
import itertools
import os
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from launcher.security.memory_limit import bounded_memory

# A conversation takes microseconds to milliseconds.
MAX_CPU_S = 20.0
MAX_BYTES = 4 << 30
# A tokenizer's memory, and in addition for each character or token that it gets. The package tokenizers takes up to 1 KiB.
_TOKENIZER_BYTES, _BYTES_PER_ITEM = 4 << 30, 4 << 10
# Reading the size of the process takes longer than rendering most conversations.
_CALLS_PER_READ = 256
_calls = itertools.count()
# CPU seconds between repeated signals: Python ignores exceptions in some places, such as the deletion of an object.
_REPEAT_S = 0.1
# CPU seconds of the process and the kernel after MAX_CPU_S until SIGPROF ends the process: nothing handles this signal.
_GRACE_S = 20.0
_is_armed = False
T = TypeVar("T")


class LimitReached(BaseException):
    """A template takes too much time or memory; the message says which. No `except Exception` in Jinja's tests catches it."""


def limited(action: Callable[[], T], max_cpu_s: float | None = None) -> T:
    """Run an action with at most `max_cpu_s` (None: MAX_CPU_S) and MAX_BYTES of additional memory.

    If it is still running _GRACE_S later, SIGPROF ends the process: see security.memory_limit.explain_end.

    Only the main thread can be limited. This is not a context manager, because the limit could be reached again while leaving it.

    Raises:
        LimitReached: if it exceeds a limit.
    """
    if threading.current_thread() is not threading.main_thread():
        return action()
    max_cpu_s = MAX_CPU_S if max_cpu_s is None else max_cpu_s
    if max_cpu_s <= 0:
        # A timer of no time would not be set.
        raise _too_long()
    global _is_armed
    if signal.getsignal(signal.SIGVTALRM) is not _raise:
        signal.signal(signal.SIGVTALRM, _raise)
    before = resource.getrlimit(resource.RLIMIT_AS)
    allowed = _num_address_bytes(next(_calls) // _CALLS_PER_READ) + MAX_BYTES
    within = [allowed if limit == resource.RLIM_INFINITY else min(allowed, limit) for limit in before]
    resource.setrlimit(resource.RLIMIT_AS, (within[0], before[1]))
    try:
        _is_armed = True
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s + _GRACE_S)
        signal.setitimer(signal.ITIMER_VIRTUAL, max_cpu_s, _REPEAT_S)
        return action()
    except MemoryError:
        raise LimitReached(f"takes more than {MAX_BYTES >> 30} GiB of memory for one conversation") from None
    finally:
        # This comes first and without a call, because Python handles signals at calls.
        _is_armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def bounded_tokenizer(num_items: int) -> AbstractContextManager[None]:
    """Limit the memory for what a tokenizer does with this number of characters or tokens.

    If it needs more, the package tokenizers prints how much, and ends the process (SIGABRT).
    """
    return bounded_memory(_TOKENIZER_BYTES + _BYTES_PER_ITEM * num_items)


def decode(tokenizer: Any, ids: Sequence[int], **options: Any) -> str:
    """Return the text of tokens, within bounds of memory; `options` are those of the tokenizer's `decode`."""
    with bounded_tokenizer(len(ids)):
        return str(tokenizer.decode(ids, **options))


def _raise(*_: Any) -> None:
    if _is_armed:
        raise _too_long()


def _too_long() -> LimitReached:
    return LimitReached(f"takes more than {MAX_CPU_S:g} s for one conversation")


@functools.lru_cache(maxsize=1)
def _num_address_bytes(_time: int) -> int:
    """Return the address space of this process; calls with equal arguments get the first call's value."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read(64).split()[0]) * os.sysconf("SC_PAGE_SIZE")
