"""A file that occupies disk space for the records of an attempt's end, so that they can be written on a full disk."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from launcher.plan.run_dir import RunDir

_RESERVED_BYTES = 512 * 1024
# What the records of an end take at most.
_NEEDED_BYTES = 128 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)


def keep(run: RunDir, attempt: int) -> None:
    """Occupy the space; without the file, the end of an attempt on a full disk is not recorded."""
    with suppress(OSError), open(_path(run, attempt), "wb") as file:
        # Written, because compressing and copy-on-write file systems allocate nothing for zeros.
        file.write(os.urandom(_RESERVED_BYTES))
        os.fsync(file.fileno())


def release(run: RunDir, attempt: int) -> None:
    """Give the space back; call it when the records are written."""
    with suppress(OSError):
        _path(run, attempt).unlink()


def release_if_full(run: RunDir, attempt: int) -> bool:
    """Give the space back where the disk has no room for the records; returns whether it had none."""
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
