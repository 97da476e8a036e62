"""POSIX access control lists: users and groups that can write to a file in addition to those that its mode names.

For the format see include/uapi/linux/posix_acl_xattr.h in Linux; for the rules see acl(5).
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

_ATTRIBUTE = "system.posix_acl_access"
_VERSION = 2
_HEADER, _ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
# Tags of the entries; the mode also contains the entries for the owner and for everyone.
_USER, _OWNING_GROUP, _GROUP = 0x02, 0x04, 0x08
_WRITE = 2


@dataclass(frozen=True)
class Writers:
    """The ids of users and groups that can write to a file, except its owner and permissions that everyone has."""

    uids: tuple[int, ...] = ()
    gids: tuple[int, ...] = ()


def has_acl(path: Path) -> bool:
    """Return whether a file's permissions include entries for other users or groups."""
    return _read(path) is not None


def read_writers(path: Path, status: os.stat_result) -> Writers:
    """Return who can write to a file besides its owner and everyone.

    With an ACL, the group bits in the mode are its mask: the maximum that its entries for users and groups grant.
    """
    if not status.st_mode & stat.S_IWGRP:
        return Writers()
    acl = _read(path)
    if acl is None:
        return Writers(gids=(status.st_gid,))
    entries = [entry for entry in _ENTRY.iter_unpack(acl[_HEADER.size :]) if entry[1] & _WRITE]
    uids = tuple(uid for tag, _, uid in entries if tag == _USER and uid != status.st_uid)
    named = (gid for tag, _, gid in entries if tag == _GROUP)
    owning = [status.st_gid] if any(tag == _OWNING_GROUP for tag, _, _ in entries) else []
    return Writers(uids, tuple(dict.fromkeys([*owning, *named])))


def _read(path: Path) -> bytes | None:
    """Return the ACL of a file, or None if it has none, or its file system has none."""
    try:
        acl = os.getxattr(path, _ATTRIBUTE, follow_symlinks=False)
    except OSError:
        return None
    is_known = len(acl) % _ENTRY.size == _HEADER.size and _HEADER.unpack_from(acl) == (_VERSION,)
    return acl if is_known else None
