"""How much slower this machine is now than an idle reference machine; tests multiply their deadlines by this."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache

# Seconds for the loop below on one idle core of the machine for which the deadlines were chosen.
_REFERENCE_S = 0.030
_MOST = 6.0


def slowness() -> float:
    """1 on a fast, idle machine; higher on a slower one, and while more processes want to run than there are cores."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    return min(_MOST, max(1.0, _core_slowness() * max(1.0, busy)))


@cache
def _core_slowness() -> float:
    # Take the fastest of several runs: another process may have used the core during the others.
    return min(_measured() for _ in range(5)) / _REFERENCE_S


def _measured() -> float:
    began = time.perf_counter()
    total = 0
    for number in range(500_000):
        total += number & 7
    return time.perf_counter() - began


def wait_for(what: str, condition: Callable[[], object], deadline_s: float = 60.0) -> None:
    """Wait until the condition holds; fail after `deadline_s`, scaled by `slowness()`."""
    began = looked = time.monotonic()
    while not condition():
        now = time.monotonic()
        assert now - began < deadline_s * slowness(), f"waited {now - began:.0f} s for {what}"
        # A condition reads files, inspects processes or runs a command, which takes CPU time from what the test waits for.
        time.sleep(max(min(0.3, 0.03 + (now - began) / 30), 3 * (now - looked)))
        looked = time.monotonic()
