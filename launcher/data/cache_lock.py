"""Waits for another process that builds or downloads the same part of the launcher's cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launcher import locks
from launcher.errors import DataError, Problem
from launcher.security.redaction import redacted_command_line

# The kernel releases a lock when its holder ends, so this only has to be longer than any build or download.
MAX_WAIT_S = 24 * 3600.0
WARN_EVERY_S = 600.0

# A logger without a handler writes warnings unformatted to standard error.
_LOG = logging.getLogger(__name__)


@contextmanager
def wait_and_hold(path: Path, activity: str) -> Iterator[None]:
    """Hold the lock file `path` once no other process does; until then, warn every WARN_EVERY_S seconds.

    `activity` describes in the warning what the other process does, as in "builds this data cache".

    Raises:
        DataError: if another process still holds the lock after MAX_WAIT_S seconds.
        OSError: if the file cannot be created.
    """
    deadline, timeout_s = time.monotonic() + MAX_WAIT_S, 0.0
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locks.hold(path, timeout_s, redacted_command_line(), mode=0o600))
                break
            except locks.LockTimeout:
                holder = locks.read_holder(path)
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    message, remedy = f"another process {activity} and takes too long", "wait for it, or end it and try again"
                    raise DataError(Problem(message, str(path), "" if holder is None else str(holder), remedy)) from None
                _LOG.warning("waiting for another process that %s (%s)", activity, path if holder is None else holder)
                timeout_s = min(WARN_EVERY_S, left_s)
        yield
