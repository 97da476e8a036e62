"""A file that reserves disk space for the records of an attempt's end, so that they can be written when the disk is full."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from launcher.plan.run_dir import RunDir

_RESERVED_BYTES = 512 * 1024
# The most that the records of an attempt's end take.
_NEEDED_BYTES = 128 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)


def keep(run: RunDir, attempt: int) -> None:
    """Reserve the space; without it, the end of an attempt on a full disk is not recorded."""
    with suppress(OSError), open(_path(run, attempt), "wb") as file:
        # Write random bytes: compressing and copy-on-write file systems allocate nothing for zeros.
        file.write(os.urandom(_RESERVED_BYTES))
        os.fsync(file.fileno())


def release(run: RunDir, attempt: int) -> None:
    """Free the space; call it when the records are written."""
    with suppress(OSError):
        _path(run, attempt).unlink()


def release_if_full(run: RunDir, attempt: int) -> bool:
    """Free the space if the disk has no room for the records; returns whether it had none."""
    probe = run.attempt(attempt) / ".probe"
    try:
        with open(probe, "wb") as file:
            file.write(os.urandom(_NEEDED_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        is_full = error.errno in _FULL
    else:
        is_full = False
    with suppress(OSError):
        probe.unlink()
    if is_full:
        release(run, attempt)
    return is_full


def _path(run: RunDir, attempt: int) -> Path:
    return run.attempt(attempt) / ".reserve"
