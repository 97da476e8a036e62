"""Files of other users, pipes, devices, and a directory as an NFS client may see it."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from missing_program import skip_or_fail

# IDs that no user of a fresh machine has.
MALLORY, TEAM = 54321, 54322


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        skip_or_fail("only root can give files to another user: run pytest as root")


def give(path: Path, uid: int = MALLORY) -> None:
    """Give a folder and its contents to another user."""
    for one in (path, *path.rglob("*")):
        os.chown(one, uid, -1, follow_symlinks=False)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@contextmanager
def stale(folder: Path) -> Iterator[None]:
    """Make this process see only the current names in `folder`, until it creates a file there itself.

    An NFS client caches a directory for up to a minute, and reads it again after its own changes.
    """
    known: set[str] | None = {*os.listdir(folder)}
    real_stat, real_open = os.stat, os.open

    def stat(path: Any, *options: Any, **more: Any) -> os.stat_result:
        if not isinstance(path, int) and known is not None:
            target = Path(os.fsdecode(path))
            if target.parent == folder and target.name not in known:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target))
        return real_stat(path, *options, **more)

    def open_file(path: Any, flags: int, *options: Any, **more: Any) -> int:
        nonlocal known
        if flags & os.O_CREAT and Path(os.fsdecode(path)).parent == folder:
            known = None
        return real_open(path, flags, *options, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", stat)
        patch.setattr(os, "open", open_file)
        yield


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a disk of this size, such as `8m`, on a folder; only root can."""
    if os.geteuid():
        skip_or_fail("only root can mount a small disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True, timeout=10)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, timeout=10)
