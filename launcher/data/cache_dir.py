"""Where the launcher keeps what it has made or fetched on this machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from launcher.errors import DataError, Problem

# The disk, the user's quota, or the largest file that a process may write.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_root() -> Path:
    """$LAUNCHER_CACHE, else $XDG_CACHE_HOME/launcher, else ~/.cache/launcher."""
    if root := os.environ.get("LAUNCHER_CACHE"):
        return Path(root).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "launcher"


def source_folder(*parts: object) -> Path:
    """Where what is known or fetched of a source that lies elsewhere is kept; `parts` say what it is."""
    return cache_root() / "sources" / xxhash.xxh3_128_hexdigest(json.dumps([str(part) for part in parts]).encode())


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Errors: DataError in place of an OSError, for what is written to or read from `folder` in the launcher's cache."""
    try:
        yield
    except OSError as error:
        raise unusable(error, folder) from error


def is_full(error: OSError) -> bool:
    """True where there is no more space for what is to be written."""
    return error.errno in _FULL


def unusable(error: OSError, folder: Path) -> DataError:
    """What a person is told of `error`: what was written to `folder`, what is free there, and what to do."""
    elsewhere = f"set LAUNCHER_CACHE to a folder on another disk (now {cache_root()})"
    what = f"the launcher's cache cannot be used: {error.strerror or error}"
    if not is_full(error):
        return DataError(
            Problem(
                what, str(error.filename or folder), remedy=f"see that it may be written and that its disk works, or {elsewhere}"
            )
        )
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    value = f"{_size(written)} were written to this folder, and {_size(shutil.disk_usage(there).free)} are free on its disk"
    return DataError(Problem(what, str(folder), value, f"free more space (or raise the quota), or {elsewhere}"))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
