"""The folders and links that the system traverses to open a file: whoever can change one of them chooses the file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.security.trust import FLAG, Trust, uid_of_unmapped_users, user_name

# Linux's limit; https://man7.org/linux/man-pages/man7/path_resolution.7.html
MAX_LINKS = 40


def path_steps(path: Path) -> list[Path]:
    """Return each folder and link from the root to a file, in the order of traversal, and finally the file itself.

    If links form a cycle, the last entry is a link.
    """
    steps, current, num_links = list[Path](), Path("/"), 0
    names = list(reversed(path.absolute().parts[1:]))
    while names:
        steps.append(current)
        name = names.pop()
        if name == "..":
            current = current.parent
        elif (entry := current / name).is_symlink() and num_links < MAX_LINKS:
            num_links += 1
            steps.append(entry)
            target = Path(os.readlink(entry))
            current = Path("/") if target.is_absolute() else current
            names += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        else:
            current = entry
    return [*dict.fromkeys(step for step in steps if step != current), current]


@contextmanager
def entry_in_open_folder(path: Path, make_folder: bool = False) -> Iterator[str]:
    """Yield another path of the entry `path`, valid in this block: it leads through the open folder of the entry.

    Whatever other users rename or link meanwhile, it stays in the folder to which `path` led through links of trusted users only.
    With `make_folder`, missing folders are created.

    Raises:
        PermissionError: with another user's link.
        OSError: if the folder cannot be opened or created. Errors in the block name the folder of `path`, not the open one.
    """
    try:
        descriptor = _open(path.parent, make_folder)
    except OSError as error:
        if not str(error.filename or "").startswith("/"):
            # It names a part of the path alone.
            error.filename = str(path.parent)
        raise
    opened = f"/proc/self/fd/{descriptor}"
    try:
        yield f"{opened}/{path.name}"
    except OSError as error:
        for name in ("filename", "filename2"):
            if str(failed := getattr(error, name) or "").startswith(f"{opened}/"):
                setattr(error, name, str(path.parent) + str(failed).removeprefix(opened))
        raise
    finally:
        os.close(descriptor)


def _open(folder: Path, make: bool) -> int:
    """Return a descriptor of a folder. Each link on the way is examined and read through a descriptor of its own."""
    # What is mounted on demand is not mounted by opening such descriptors.
    with suppress(OSError):
        os.stat(f"{folder}/.")
    names, num_links, are_chosen = list(reversed(folder.absolute().parts[1:])), 0, True
    trust, outside = Trust.from_environ(os.environ), uid_of_unmapped_users()
    current = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        while names:
            name = names.pop()
            are_chosen = _are_entries_chosen(os.fstat(current), trust, are_chosen)
            entry = _open_entry(name, current, make)
            status = os.fstat(entry)
            if not stat.S_ISLNK(status.st_mode):
                os.close(current)
                current = entry
                continue
            target = os.readlink("", dir_fd=entry)
            os.close(entry)
            num_links += 1
            # In a rootless container, the links of the host's root and of an image belong to a user outside.
            is_outside = status.st_uid == outside and are_chosen
            if not trust.anyone and not trust.accepts_owner(status.st_uid) and not is_outside:
                owner = user_name(status.st_uid)
                message = f"the link of another user is not followed (if you trust {owner}, add {FLAG} {owner})"
                raise PermissionError(errno.EPERM, message, f"{folder}: {name} -> {target}")
            if num_links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
            if target.startswith("/"):
                root = os.open("/", os.O_PATH | os.O_DIRECTORY)
                os.close(current)
                current = root
            names += reversed([part for part in Path(target).parts if part != "/"])
    except BaseException:
        os.close(current)
        raise
    return current


def _are_entries_chosen(folder: os.stat_result, trust: Trust, is_chosen: bool) -> bool:
    """Return whether nobody but the owners of a folder has chosen what is in it; `is_chosen` tells it of the folder itself.

    Users outside a container look alike: where one can write, they can put a folder and links of their own.
    """
    if folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    return is_chosen or trust.accepts_owner(folder.st_uid)


def _open_entry(name: str, folder: int, make: bool) -> int:
    """Return a descriptor of a folder or link in an open folder, and create a folder there first if `make` says so."""
    flags = os.O_PATH | os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise
    try:
        os.mkdir(name, dir_fd=folder)
    except FileExistsError:
        # Another upload has created it meanwhile.
        pass
    return os.open(name, flags, dir_fd=folder)
