"""The users and groups whose files a command accepts: this user, root, and the owners named with --trust-owner."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import ConfigError, Problem

FLAG = "--trust-owner"
VARIABLE = "LAUNCHER_TRUST_OWNERS"
# Words in the flag and the variable that are not users.
ANYONE, GROUP_PREFIX = "anyone", "group:"
# The number of user ids in the map of a namespace that maps all of them; the last id stands for no user.
_NUM_UIDS = 2**32 - 1


@dataclass(frozen=True)
class Trust:
    """The users and groups whose files are accepted; with `anyone`, all files are."""

    uids: frozenset[int]
    gids: frozenset[int] = frozenset()
    anyone: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Trust:
        """Return this user, root, and the owners in LAUNCHER_TRUST_OWNERS: user names or ids, group:NAME, or anyone.

        Raises:
            ConfigError: with the names that this machine does not know.
        """
        uids, gids, anyone, problems = {os.geteuid(), 0}, set(), False, []
        for name in filter(None, (part.strip() for part in environ.get(VARIABLE, "").split(","))):
            try:
                if name == ANYONE:
                    anyone = True
                elif name.startswith(GROUP_PREFIX):
                    gids.add(group_id(name.removeprefix(GROUP_PREFIX)))
                else:
                    uids.add(int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid)
            except KeyError:
                remedy = "write the name or the number of a user, or group:NAME, as `ls -l` and `ls -ln` show them"
                problems.append(Problem("there is no such user or group on this machine", f"{FLAG} or {VARIABLE}", name, remedy))
        if problems:
            raise ConfigError(problems)
        return cls(frozenset(uids), frozenset(gids), anyone)

    def with_group(self, gid: int | None) -> Trust:
        """Return this trust extended to a group's members, for what they share intentionally."""
        return self if gid is None else replace(self, gids=self.gids | {gid})

    def with_user(self, uid: int) -> Trust:
        """Return this trust extended to one more user, for what they intentionally own."""
        return replace(self, uids=self.uids | {uid})

    def as_numbers(self) -> str:
        """Return a value of LAUNCHER_TRUST_OWNERS for machines that may not know user and group names."""
        if self.anyone:
            return ANYONE
        return ",".join([*(str(uid) for uid in sorted(self.uids)), *(f"{GROUP_PREFIX}{gid}" for gid in sorted(self.gids))])

    def accepts_owner(self, uid: int) -> bool:
        return uid in self.uids or any(_is_member(uid, gid) for gid in self.gids)

    def accepts_group(self, gid: int, owner: int) -> bool:
        """Return whether the members of a group may write to a file of `owner`."""
        # In Kubernetes, storage belongs to root and to the group of the pods' user.
        return gid in self.gids or any(_is_private_group(gid, uid) for uid in (owner, *self.uids))


def add_to_environ(owners: Iterable[str]) -> None:
    """Add owners to LAUNCHER_TRUST_OWNERS, which the processes of this command inherit.

    Raises:
        ConfigError: with the names that this machine does not know.
    """
    added = list(owners)
    if not all(added):
        raise ConfigError(f"{FLAG} needs the name or the number of a user", where=FLAG, remedy=f"write {FLAG} NAME")
    os.environ[VARIABLE] = ",".join(filter(None, (os.environ.get(VARIABLE, ""), *added)))
    Trust.from_environ(os.environ)


def group_id(group: str) -> int:
    """Return the gid of a group given by name or number.

    Raises:
        KeyError: if this machine has no group of that name.
    """
    return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid


def user_name(uid: int) -> str:
    """Return the name of a user, or their uid if this machine does not know the name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """Return the name of a group, or its gid if this machine does not know the name."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def uid_of_unmapped_users() -> int | None:
    """Return the uid shown for files of users outside this user namespace, or None if every user is mapped, as on a host.

    In rootless containers (podman, Apptainer, enroot), these are the host's root and other users.
    """
    with suppress(OSError, ValueError):
        lengths = [int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if sum(lengths) < _NUM_UIDS:
            return int(Path("/proc/sys/kernel/overflowuid").read_text())
    return None


def _is_member(uid: int, gid: int) -> bool:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return False
    return gid in os.getgrouplist(user.pw_name, user.pw_gid)


def private_gids(uids: Iterable[int]) -> frozenset[int]:
    """Return the users' private groups."""
    gids = set[int]()
    for uid in uids:
        with suppress(KeyError):
            gid = pwd.getpwuid(uid).pw_gid
            gids |= {gid} if _is_private_group(gid, uid) else set()
    return frozenset(gids)


def _is_private_group(gid: int, uid: int) -> bool:
    """Return whether a group is a user private group, which many systems create: same name, no other members."""
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    is_own = (user.pw_gid, user.pw_name) == (gid, group.gr_name) and set(group.gr_mem) <= {user.pw_name}
    # Many users outside a namespace share that user's uid, and their groups share its gid.
    return is_own and uid != uid_of_unmapped_users()
