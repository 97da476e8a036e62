"""Whom a command trusts: the folders that it uses belong to this user, to root or to a named owner, and others cannot write them.

As ssh does with its own files, a command checks a folder and all folders above it, once, before it uses what is in there.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import ConfigError, Problem, SubmitError

FLAG = "--trust-owner"
VARIABLE = "LAUNCHER_TRUST_OWNERS"
# Words in the flag and the variable that are not users.
ANYONE, GROUP_PREFIX = "anyone", "group:"
# The number of user ids in the map of a namespace that maps all of them; the last id stands for no user.
_NUM_UIDS = 2**32 - 1
# Entries of a POSIX access control list (posix_acl_xattr.h): tag, permissions, id; and the tags of users and groups.
_ACL, _ACL_ENTRY = "system.posix_acl_access", struct.Struct("<HHI")
_ACL_USER, _ACL_OWNING_GROUP, _ACL_GROUP = 2, 4, 8


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

    def with_group(self, gid: int) -> Trust:
        """Return this trust extended to a group's members, for what they share intentionally."""
        return replace(self, gids=self.gids | {gid})

    def as_numbers(self) -> str:
        """Return a value of LAUNCHER_TRUST_OWNERS for machines that may not know user and group names."""
        if self.anyone:
            return ANYONE
        return ",".join([*(str(uid) for uid in sorted(self.uids)), *(f"{GROUP_PREFIX}{gid}" for gid in sorted(self.gids))])

    def accepts_owner(self, uid: int) -> bool:
        return self.anyone or uid in self.uids or any(_is_member(uid, gid) for gid in self.gids)

    def accepts_group(self, gid: int, owner: int) -> bool:
        """Return whether the members of a group may write to a file of `owner`."""
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


def accepts_owner(uid: int) -> bool:
    """Return whether this user trusts files that a given user owns."""
    return Trust.from_environ(os.environ).accepts_owner(uid)


def folder_problem(subject: str, folder: Path, trust: Trust | None = None) -> Problem | None:
    """Return why other users could change what is in a folder, which need not exist yet, or None if they could not.

    The folder and the folders above it must belong to trusted users, and only they may write to them. A sticky folder above may
    be writable, and in a folder that nobody else can enter any mode is fine.
    """
    trust = trust or Trust.from_environ(os.environ)
    if trust.anyone:
        return None
    typed, real = folder.absolute(), Path(os.path.realpath(folder))
    links = [step for step in (*reversed(typed.parents), typed) if step.is_symlink()]
    is_hidden = False
    for step in (*links, *reversed(real.parents), real):
        try:
            status = step.lstat()
        except OSError:
            # It does not exist: this user will create it, or cannot use it.
            continue
        mode = status.st_mode
        is_outside = step != real and status.st_uid == uid_of_unmapped_users()
        if not trust.accepts_owner(status.st_uid) and not is_outside:
            user = user_name(status.st_uid)
            return _make_problem(subject, step, f"belongs to {user}", _write_trust_remedy(user))
        if stat.S_ISLNK(mode) or is_hidden or (step != real and mode & stat.S_ISVTX):
            continue
        sticky = " (or +t, for a folder that several users share)" if step != real else ""
        if mode & stat.S_IWOTH:
            anyone = f"if the storage shows these permissions for all files and only you use the machine, set {VARIABLE}={ANYONE}"
            return _make_problem(subject, step, "can be written by everyone", f"chmod o-w {step}{sticky}; {anyone}")
        if (mode & stat.S_IWGRP) and (writer := _find_distrusted_writer(step, status, trust)):
            remedy = f"chmod g-w {step}{sticky}; {_write_trust_remedy(writer)}"
            return _make_problem(subject, step, f"can be written by {writer.replace(GROUP_PREFIX, 'the group ')}", remedy)
        is_hidden = not mode & (stat.S_IXGRP | stat.S_IXOTH)
    return None


def require_own_folder(subject: str, folder: Path, remedy: str = "") -> None:
    """Reject a folder that other users could change.

    Raises:
        SubmitError: with the folder, its owner and the remedy.
    """
    if problem := folder_problem(subject, folder):
        raise SubmitError(replace(problem, remedy=f"{remedy}; or {problem.remedy}") if remedy else problem)


def run_problem(folder: Path) -> Problem | None:
    """Return why other users could change a run in its folder, or None if they could not."""
    return folder_problem(f"the run {folder.name}", folder)


def require_run(folder: Path) -> None:
    """Reject a run that other users could have changed, before its plan or code is used, or its process ended.

    Raises:
        SubmitError: with the folder, its owner and the remedy.
    """
    require_own_folder(f"the run {folder.name}", folder)


def describe_permissions(path: Path) -> str:
    """Return the owner, the group and the mode of a file."""
    status = path.lstat()
    owner = f"{user_name(status.st_uid)} ({status.st_uid}), group {group_name(status.st_gid)} ({status.st_gid})"
    return f"owner {owner}, mode {stat.S_IMODE(status.st_mode):04o}"


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


def _make_problem(subject: str, path: Path, fact: str, remedy: str) -> Problem:
    return Problem(f"{subject} is not trusted: {path} {fact}", str(path), describe_permissions(path), remedy)


def _write_trust_remedy(owner: str) -> str:
    """Return how to accept files of an owner, given in the format of LAUNCHER_TRUST_OWNERS."""
    name = owner.replace(GROUP_PREFIX, "all members of the group ")
    return f"if you trust {name} with your account, add {FLAG} {owner}, or set {VARIABLE}={owner}"


def _find_distrusted_writer(path: Path, status: os.stat_result, trust: Trust) -> str:
    """Return a user or group that can write to a group-writable folder but should not, as in LAUNCHER_TRUST_OWNERS."""
    users, groups = list[int](), [status.st_gid]
    with suppress(OSError, struct.error):
        # With an access control list, the group bits of the mode are the maximum that its entries grant.
        entries = [(tag, id_) for tag, mode, id_ in _ACL_ENTRY.iter_unpack(os.getxattr(path, _ACL)[4:]) if mode & 2]
        users = [id_ for tag, id_ in entries if tag == _ACL_USER]
        groups = [
            status.st_gid if tag == _ACL_OWNING_GROUP else id_ for tag, id_ in entries if tag in (_ACL_OWNING_GROUP, _ACL_GROUP)
        ]
    foreign = [user_name(uid) for uid in users if not trust.accepts_owner(uid)]
    foreign += [f"{GROUP_PREFIX}{group_name(gid)}" for gid in groups if not trust.accepts_group(gid, status.st_uid)]
    return foreign[0] if foreign else ""


def _is_member(uid: int, gid: int) -> bool:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return False
    return gid in os.getgrouplist(user.pw_name, user.pw_gid)


def _is_private_group(gid: int, uid: int) -> bool:
    """Return whether a group is a user private group, which many systems create: same name, no other members."""
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    is_own = (user.pw_gid, user.pw_name) == (gid, group.gr_name) and set(group.gr_mem) <= {user.pw_name}
    # Many users outside a namespace share that user's uid, and their groups share its gid.
    return is_own and uid != uid_of_unmapped_users()
