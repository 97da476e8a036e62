"""Folders that a run creates for its user only, or for the members of a group."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from launcher.errors import ConfigError, DataError, Problem
from launcher.security.permissions import describe_permissions, first_problem_above
from launcher.security.trust import VARIABLE, Trust, group_id, uid_of_unmapped_users, user_name

# The subject of problems with a file or folder of the launcher's cache.
CACHE_PART = "this part of the cache"
# Tries to create a folder that other processes of this user create at the same time.
_NUM_TRIES = 20


@contextmanager
def private_files() -> Iterator[None]:
    """Make everything that this process writes readable only by its user, as in a run; use it if only one thread writes."""
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def closed_umask() -> int:
    """Return this process's umask, extended so that distrusted users cannot write to what is created with it.

    Libraries create their caches as the umask says, use them at once, and follow links in them. If LAUNCHER_TRUST_OWNERS names
    an owner that this machine does not know, nobody is trusted; what depends on the owners reports the name.
    """
    trust, mask = Trust(frozenset()), os.umask(0o077)
    os.umask(mask)
    with suppress(ConfigError):
        trust = Trust.from_environ(os.environ)
    if trust.anyone:
        return mask
    return mask | (stat.S_IWOTH if trust.gids else stat.S_IWGRP | stat.S_IWOTH)


@contextmanager
def closed_files() -> Iterator[None]:
    """Keep distrusted users from writing to what this process and its children create, whatever the umask; see `closed_umask`."""
    mask = os.umask(closed_umask())
    try:
        yield
    finally:
        os.umask(mask)


def make_own_folder(folder: Path) -> None:
    """Create a folder and its missing parents. If the umask lets distrusted users write to them, their permission is removed.

    Raises:
        OSError: if one cannot be created.
    """
    missing = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    folder.mkdir(parents=True, exist_ok=True)
    if missing and first_problem_above(CACHE_PART, folder, Trust.from_environ(os.environ)):
        for one in missing:
            one.chmod(stat.S_IMODE(one.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))


def make_shared_folder(folder: Path, group: str) -> None:
    """Create a folder in which each member of a group can create files and change only their own.

    The owner of a sticky folder can replace everything in it. Therefore only the owner of its parent folder, or root, may create
    it: the members already trust them.

    Raises:
        DataError: if the group does not exist, this user is not a member, or other users created the folder or could replace it.
        OSError: if it cannot be created.
    """
    gid = shared_group(group)
    if gid not in (*os.getgroups(), os.getegid()) and os.geteuid() != 0:
        remedy = "name a group that you belong to; `id` lists them"
        raise DataError(Problem("this user does not belong to the group", "data.cache_group", group, remedy))
    folder.parent.mkdir(parents=True, exist_ok=True)
    owner = folder.parent.stat().st_uid
    by_owner = f"ask {user_name(owner)} to run: mkdir {folder} && chgrp {group} {folder} && chmod 3770 {folder}"
    if problem := shared_folder_problem(folder):
        is_replaced = problem.where == str(folder) and folder.lstat().st_uid != uid_of_unmapped_users()
        raise DataError(replace(problem, remedy=f"remove it, and {by_owner}") if is_replaced else problem)
    if folder.exists():
        return
    if os.geteuid() not in (0, owner):
        message = f"only {user_name(owner)}, who owns {folder.parent}, can create the folder of a group there"
        raise DataError(Problem(message, "data.cache_group", group, by_owner))
    folder.mkdir(mode=0o700, exist_ok=True)
    os.chown(folder, -1, gid)
    folder.chmod(0o3770)


def shared_folder_problem(folder: Path) -> Problem | None:
    """Return why a folder with a group's shared caches is not used (another user could replace it), or None if it can be used.

    It must belong to this user, to root or to the owner of its parent folder, and must not be a link.
    """
    trust, owner = Trust.from_environ(os.environ), folder.parent.stat().st_uid
    # In a rootless container, the parent folder's owner and all members have the same uid.
    outside = uid_of_unmapped_users()
    trust = trust if owner == outside else trust.with_user(owner)
    if problem := first_problem_above(CACHE_PART, folder, trust, may_be_hidden=True):
        return problem
    if folder.is_symlink():
        return Problem(f"{CACHE_PART} is a link, and the folder of a group must not be one", str(folder), remedy="remove it")
    if folder.exists() and folder.lstat().st_uid == outside and not (trust.anyone or trust.accepts_owner(outside)):
        message = f"{CACHE_PART} is not trusted: {folder} belongs to a user outside this container"
        remedy = f"build the data outside the container, or set {VARIABLE}={user_name(outside)}"
        return Problem(message, str(folder), describe_permissions(folder), remedy)
    return None


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """Open a folder (not a link) for this block; yields its descriptor, which stays valid whatever the name later leads to."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def share(descriptor: int, folder: Path, group: str) -> None:
    """Let a group's members read the open folder and its content; `folder` is its name.

    Raises:
        DataError: if the name now leads to something else.
    """
    gid = shared_group(group)
    for _, _, names, parent in os.fwalk(".", dir_fd=descriptor):
        os.fchown(parent, -1, gid)
        os.fchmod(parent, 0o750)
        for name in names:
            _share_file(name, parent, gid)
    opened = os.fstat(descriptor)
    try:
        is_same = os.path.samestat(opened, folder.lstat())
    except FileNotFoundError:
        is_same = False
    if not is_same:
        message = "another user has replaced the folder in which this data cache was built"
        remedy = f"remove what is there, and make {folder.parent} a folder of the owner of {folder.parent.parent}"
        raise DataError(Problem(message, "data.cache_group", str(folder), remedy))


def _share_file(name: str, folder: int, gid: int) -> None:
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        os.fchown(file, -1, gid)
        os.fchmod(file, 0o640)
    finally:
        os.close(file)


def usable_part(folder: Path, make: bool = False) -> Path | None:
    """Return a folder in the launcher's cache if it is not a link and only this user and trusted owners can replace it.

    With `make`, it is created if it does not exist. Returns None if it is missing or unusable: no command needs it.
    """
    with suppress(OSError):
        if make:
            make_own_folder(folder.parent)
            folder.mkdir(mode=0o700, exist_ok=True)
        is_folder = stat.S_ISDIR(folder.lstat().st_mode)
        if is_folder and first_problem_above(CACHE_PART, folder, Trust.from_environ(os.environ), may_be_hidden=True) is None:
            return folder
    return None


def make_private_folder(folder: Path, where: str) -> None:
    """Create an empty folder that only this user can enter, replacing their earlier one; `where` names its setting.

    Other users may know its name and have created the folder, or a link of that name, first. Several processes of this user, such
    as those on nodes that share the folder, may call this at the same time, before any of them writes to it.

    Raises:
        ConfigError: if another user created it.
        OSError: if it cannot be created.
    """
    for _ in range(_NUM_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            # Another process of this user may be removing the folder at the same time.
            with suppress(FileNotFoundError):
                if is_private_folder(folder) and not any(folder.iterdir()):
                    return
        else:
            return
    remedy = "remove it, or set another folder; a sticky folder above it (chmod +t) keeps others from replacing yours"
    message = "the folder exists already, and this user cannot empty it: another user may have created it"
    raise ConfigError(message, where=where, value=f"{folder}: {describe_permissions(folder)}", remedy=remedy)


def is_private_folder(folder: Path) -> bool:
    """Return whether this is a folder (not a link) that belongs to this user and that no other user can enter."""
    with suppress(OSError):
        status = folder.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return False


def shared_group(group: str) -> int:
    """Return the gid of the group in data.cache_group.

    Raises:
        DataError: if this machine does not have it.
    """
    try:
        return group_id(group)
    except KeyError:
        remedy = "name a group of this machine that you belong to; `id` lists them"
        raise DataError(Problem("there is no such group", "data.cache_group", group, remedy)) from None
