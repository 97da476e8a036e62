"""Locks of what one process makes on this machine while others wait for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from launcher.errors import DataError, Problem
from launcher.holder import holder_at, named

# The system releases a lock when its holder ends, so this is longer than anything takes to be made.
LONGEST_WAIT_S = 24 * 3600.0
SAID_EVERY_S = 600.0

# Without a handler of its own a warning goes to standard error as it is.
_LOG = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, does: str) -> Iterator[None]:
    """Hold the lock file `path`; `does` tells of another process that holds it, as in "builds this data cache".

    As long as another one lives and holds it, that is said every SAID_EVERY_S seconds.
    Errors: DataError after LONGEST_WAIT_S.
    """
    lock = filelock.FileLock(path, mode=0o600)
    until, wait_s = time.monotonic() + LONGEST_WAIT_S, 0.0
    while True:
        try:
            lock.acquire(timeout=wait_s)
            break
        except filelock.Timeout as error:
            holder = holder_at(path)
            left_s = until - time.monotonic()
            if left_s <= 0:
                what, remedy = f"another process that {does} takes too long", "wait for it, or end it and try again"
                raise DataError(Problem(what, str(path), "" if holder is None else str(holder), remedy)) from error
            _LOG.warning("waiting for another process that %s (%s)", does, path if holder is None else holder)
            wait_s = min(SAID_EVERY_S, left_s)
    try:
        with named(path):
            yield
    finally:
        lock.release()
