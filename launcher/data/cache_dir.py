"""The launcher's cache folder on this machine, and errors for failed writes to it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from launcher.errors import DataError, Problem
from launcher.plan.quantities import format_size
from launcher.security.folders import require_cache

SHARED_CACHE_VARIABLE = "LAUNCHER_SHARED_CACHE"
# The disk or the user's quota is full, or the file exceeds the process's size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_root() -> Path:
    """Return $LAUNCHER_CACHE, else $XDG_CACHE_HOME/launcher, else ~/.cache/launcher.

    Raises:
        DataError: if other users could change what is in it.
    """
    root = cache_path()
    require_cache(root)
    return root


def cache_path() -> Path:
    """Return the folder of `cache_root`, whoever can write to it."""
    if root := os.environ.get("LAUNCHER_CACHE"):
        return Path(root).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "launcher"


def shared_cache_root() -> Path | None:
    """Return $LAUNCHER_SHARED_CACHE, where groups share their data caches; None if unset."""
    root = os.environ.get(SHARED_CACHE_VARIABLE)
    return Path(root).expanduser().absolute() if root else None


def source_folder(*parts: object) -> Path:
    """Return the folder for the files and records of a remote source, identified by `parts`."""
    return cache_root() / "sources" / xxhash.xxh3_128_hexdigest(json.dumps([str(part) for part in parts]).encode())


def mark_used(folder: Path) -> None:
    """Record that a command has found this part of the cache and may use it; `clean` checks the folder's time."""
    # The folder may belong to another user, or the storage may be mounted read-only.
    with suppress(OSError):
        os.utime(folder)


@contextmanager
def convert_os_errors(folder: Path) -> Iterator[None]:
    """Convert an OSError into a DataError with a remedy, while `folder` in the launcher's cache is read or written."""
    try:
        yield
    except OSError as error:
        raise make_cache_error(error, folder) from error


def is_full(error: OSError) -> bool:
    """Return True if there is no space left for the file."""
    return error.errno in _FULL


def make_cache_error(error: OSError, folder: Path) -> DataError:
    """Return the user's error: the size written to `folder`, the free space, and the remedy."""
    elsewhere = f"set LAUNCHER_CACHE to a folder on another disk (now {cache_root()})"
    message = f"the launcher's cache cannot be used: {error.strerror or error}"
    if not is_full(error):
        remedy = f"check that this user may write there and that the disk works, or {elsewhere}"
        return DataError(Problem(message, str(error.filename or folder), remedy=remedy))
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    value = f"{format_size(shutil.disk_usage(existing).free)} are free on its disk without the unfinished files"
    return DataError(Problem(message, str(folder), value, f"free more space (or raise the quota), or {elsewhere}"))
