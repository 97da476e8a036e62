"""Folders that a run makes for its user alone, or for the members of a group."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.errors import ConfigError, DataError, Problem
from launcher.security.permissions import describe_permissions, first_problem, tree
from launcher.security.trust import Trust, group_id

# Tries to make a folder that other processes of this user make at the same time.
_NUM_TRIES = 20


@contextmanager
def private_files() -> Iterator[None]:
    """Make what this process writes readable for its user alone, as what a run writes is; use it where one thread writes."""
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def make_shared_folder(folder: Path, group: str) -> None:
    """Create a folder in which each member of a group can create files and change only their own.

    Raises:
        DataError: if the group does not exist, this user is no member, or others can write to the folder.
        OSError: if it cannot be created.
    """
    gid = shared_group(group)
    if gid not in (*os.getgroups(), os.getegid()) and os.geteuid() != 0:
        remedy = "name a group that you belong to; `id` lists them"
        raise DataError(Problem("this user does not belong to the group", "data.cache_group", group, remedy))
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        trust = Trust.from_environ(os.environ).with_group(gid)
        if problem := first_problem("this part of the cache", folder, (), trust):
            raise DataError(problem) from None
        return
    os.chown(folder, -1, gid)
    folder.chmod(0o3770)


def share(folder: Path, group: str) -> None:
    """Let the members of a group read a folder with its content."""
    gid = shared_group(group)
    for path in (folder, *tree(folder)):
        os.chown(path, -1, gid)
        path.chmod(0o750 if path.is_dir() else 0o640)


def make_private_folder(folder: Path, where: str) -> None:
    """Create an empty folder that only this user can enter, in place of their earlier one; `where` names its setting.

    Its name can be known to others, who may have made it first, or a link of that name. Several processes of this user may call
    this at the same time, before any of them writes to the folder, as those of nodes that share it.

    Raises:
        ConfigError: if another user did.
        OSError: if it cannot be created.
    """
    for _ in range(_NUM_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            # Another process of this user may just remove the folder, too.
            with suppress(FileNotFoundError):
                if _is_private_and_empty(folder):
                    return
        else:
            return
    remedy = "remove it, or set another folder; a sticky folder above it (chmod +t) keeps others from replacing yours"
    message = "the folder exists already, and this user cannot empty it: another user may have made it"
    raise ConfigError(message, where=where, value=f"{folder}: {describe_permissions(folder)}", remedy=remedy)


def shared_group(group: str) -> int:
    """Return the number of the group in data.cache_group.

    Raises:
        DataError: if this machine does not have it.
    """
    try:
        return group_id(group)
    except KeyError:
        remedy = "name a group of this machine that you belong to; `id` lists them"
        raise DataError(Problem("there is no such group", "data.cache_group", group, remedy)) from None


def _is_private_and_empty(folder: Path) -> bool:
    """Return whether this is a folder, and no link, that belongs to this user and that no other user can enter."""
    status = folder.lstat()
    is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return is_private and not any(folder.iterdir())
