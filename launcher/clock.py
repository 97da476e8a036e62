"""The clock of a run: seconds since the epoch that nobody can set.

The wall clock is read once per run and machine; from then on the time since boot is added. So differences between times that
processes of a run record are durations, even if the machine's clock is set meanwhile. Child processes inherit the reading in the
environment. Later attempts, and commands that show the run, adopt it from attempt.json until the next boot of the machine.
"""

from __future__ import annotations

import functools
import os
import time
from contextlib import suppress
from pathlib import Path

_VARIABLE = "LAUNCHER_CLOCK"


def now() -> float:
    """Return the seconds since the epoch."""
    return float(reading().partition(" ")[0]) + time.clock_gettime(time.CLOCK_BOOTTIME)


def reading() -> str:
    """Return the wall clock's reading as `OFFSET BOOT`: seconds since the epoch at the boot, and the boot's id."""
    current = os.environ.get(_VARIABLE, "")
    if not _is_of_this_boot(current):
        current = f"{time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)!r} {_read_boot()}"
        os.environ[_VARIABLE] = current
    return current


def adopt(recorded: str) -> None:
    """Use the recorded reading of a run; if it is of another machine or boot, the wall clock is read again."""
    os.environ[_VARIABLE] = recorded


def _is_of_this_boot(recorded: str) -> bool:
    offset, _, boot = recorded.partition(" ")
    with suppress(ValueError):
        return boot == _read_boot() and float(offset) > 0
    return False


@functools.cache
def _read_boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename
