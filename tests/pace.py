"""How much longer than on a quiet machine things take here and now: deadlines of tests are multiplied by it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache

# What the loop below takes on one quiet core of the machine that the deadlines were chosen on.
_REFERENCE_S = 0.030
_MOST = 6.0


def slowness() -> float:
    """1 on a fast and quiet machine, more on a slower one and while more processes want to run than there are cores."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    return min(_MOST, max(1.0, _core_slowness() * max(1.0, busy)))


@cache
def _core_slowness() -> float:
    # The fastest of a few: another process may have had the core meanwhile.
    return min(_measured() for _ in range(5)) / _REFERENCE_S


def _measured() -> float:
    began = time.perf_counter()
    total = 0
    for number in range(500_000):
        total += number & 7
    return time.perf_counter() - began


def wait_for(what: str, condition: Callable[[], object], deadline_s: float = 60.0) -> None:
    """Wait until the condition holds; fails where that takes longer than `deadline_s`, at the pace of this machine."""
    began = looked = time.monotonic()
    while not condition():
        now = time.monotonic()
        assert now - began < deadline_s * slowness(), f"waited {now - began:.0f} s for {what}"
        # Conditions read files, look at processes or run a command, which takes time from what is waited for.
        time.sleep(max(min(0.3, 0.03 + (now - began) / 30), 3 * (now - looked)))
        looked = time.monotonic()
