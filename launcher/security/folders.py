"""The folders of a command: whom it trusts with them, and how it makes private and shared ones.

As ssh does with its own files, a command checks a folder and all folders above it, once, before it uses what is in there: they
belong to this user, to root or to a named owner, and others cannot write them.
"""

from __future__ import annotations

import functools
import grp
import os
import pwd
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import ConfigError, DataError, Problem, SubmitError

TRUST_FLAG = "--trust-owner"
TRUST_VARIABLE = "LAUNCHER_TRUST_OWNERS"
# Words in the flag and the variable that are not users.
ANYONE, GROUP_PREFIX = "anyone", "group:"
# The number of user ids in the map of a namespace that maps all of them; the last id stands for no user.
_NUM_UIDS = 2**32 - 1
# Entries of a POSIX access control list (posix_acl_xattr.h): tag, permissions, id; and the tags of users and groups.
_ACL, _ACL_ENTRY = "system.posix_acl_access", struct.Struct("<HHI")
_ACL_USER, _ACL_OWNING_GROUP, _ACL_GROUP = 2, 4, 8
# Caches that libraries keep in the home directory, and fail without: in many containers it is read-only, or missing.
_HOME_CACHES = (
    *("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HF_MODULES_CACHE", "HF_XET_CACHE"),
    *("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"),
)

_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


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
        for name in filter(None, (part.strip() for part in environ.get(TRUST_VARIABLE, "").split(","))):
            try:
                if name == ANYONE:
                    anyone = True
                elif name.startswith(GROUP_PREFIX):
                    gids.add(group_id(name.removeprefix(GROUP_PREFIX)))
                else:
                    uids.add(int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid)
            except KeyError:
                remedy = "write the name or the number of a user, or group:NAME, as `ls -l` and `ls -ln` show them"
                problems.append(
                    Problem("there is no such user or group on this machine", f"{TRUST_FLAG} or {TRUST_VARIABLE}", name, remedy)
                )
        if problems:
            raise ConfigError(problems)
        return cls(frozenset(uids), frozenset(gids), anyone)

    def as_numbers(self) -> str:
        """Return a value of LAUNCHER_TRUST_OWNERS for machines that may not know user and group names."""
        if self.anyone:
            return ANYONE
        return ",".join([*(str(uid) for uid in sorted(self.uids)), *(f"{GROUP_PREFIX}{gid}" for gid in sorted(self.gids))])

    def accepts_owner(self, uid: int) -> bool:
        if self.anyone or uid in self.uids:
            return True
        with suppress(KeyError):
            user = pwd.getpwuid(uid)
            return not self.gids.isdisjoint(os.getgrouplist(user.pw_name, user.pw_gid))
        return False

    def accepts_group(self, gid: int, owner: int) -> bool:
        """Return whether the members of a group may write to a file of `owner`.

        They also may if it is the private group of `owner` or of a trusted user, which many systems create: it has the user's
        name and no other members.
        """
        for uid in (owner, *self.uids):
            with suppress(KeyError):
                user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
                is_own = (user.pw_gid, user.pw_name) == (gid, group.gr_name) and set(group.gr_mem) <= {user.pw_name}
                # Many users outside a namespace share that user's uid, and their groups share its gid.
                if is_own and uid != uid_of_unmapped_users():
                    return True
        return gid in self.gids


def add_to_environ(owners: Iterable[str]) -> None:
    """Add owners to LAUNCHER_TRUST_OWNERS, which the processes of this command inherit; refuse names that are unknown here."""
    os.environ[TRUST_VARIABLE] = ",".join([os.environ.get(TRUST_VARIABLE, ""), *owners])
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
            accept = f"set {TRUST_VARIABLE}={ANYONE}"
            remedy = f"if the storage shows these permissions for all files and only you use the machine, {accept}"
            return _make_problem(subject, step, "can be written by everyone", f"chmod o-w {step}{sticky}; {remedy}")
        if (mode & stat.S_IWGRP) and (writer := _find_distrusted_writer(step, status, trust)):
            remedy = f"chmod g-w {step}{sticky}; {_write_trust_remedy(writer)}"
            return _make_problem(subject, step, f"can be written by {writer.replace(GROUP_PREFIX, 'the group ')}", remedy)
        is_hidden = not mode & (stat.S_IXGRP | stat.S_IXOTH)
    return None


def require_own_folder(subject: str, folder: Path, remedy: str = "") -> None:
    """Reject a folder that other users could change."""
    if problem := folder_problem(subject, folder):
        raise SubmitError(replace(problem, remedy=f"{remedy}; or {problem.remedy}") if remedy else problem)


def run_problem(folder: Path) -> Problem | None:
    """Return why other users could change a run in its folder, or None if they could not."""
    return folder_problem(f"the run {folder.name}", folder)


def require_run(folder: Path) -> None:
    """Reject a run that other users could have changed, before its plan or code is used, or its process ended."""
    require_own_folder(f"the run {folder.name}", folder)


def describe_permissions(path: Path) -> str:
    """Return the owner, the group and the mode of a file."""
    status = path.lstat()
    owner = f"{user_name(status.st_uid)} ({status.st_uid}), group {group_name(status.st_gid)} ({status.st_gid})"
    return f"owner {owner}, mode {stat.S_IMODE(status.st_mode):04o}"


def group_id(group: str) -> int:
    """Return the gid of a group given by name or number; raises KeyError if this machine does not know the name."""
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
    return f"if you trust {name} with your account, add {TRUST_FLAG} {owner}, or set {TRUST_VARIABLE}={owner}"


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


# Private and shared folders


@contextmanager
def private_files() -> Iterator[None]:
    """Make everything that this process writes readable only by its user, as in a run; use it if only one thread writes."""
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def make_own_folder(folder: Path) -> None:
    """Create a folder and its missing parents; only this user, and a trusted group, can write to them."""
    mode = 0o775 if Trust.from_environ(os.environ).gids else 0o755
    for one in (*reversed(folder.parents), folder):
        if not one.is_dir():
            one.mkdir(mode=mode, exist_ok=True)


def make_shared_folder(folder: Path, group: str) -> None:
    """Create a folder in which each member of a group can create files and change only their own.

    Raises:
        DataError: if the group does not exist, this user is not a member, or others than members could replace the folder.
        OSError: if it cannot be created.
    """
    gid = shared_group(group)
    if gid not in (*os.getgroups(), os.getegid()) and os.geteuid() != 0:
        remedy = "name a group that you belong to; `id` lists them"
        raise DataError("this user does not belong to the group", "data.cache_group", group, remedy)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        os.chown(folder, -1, gid)
        folder.chmod(0o3770)
    require_cache(folder, group)


def share(folder: Path, group: str) -> None:
    """Let a group's members read a folder and its content."""
    gid = shared_group(group)
    for parent, _, names in os.walk(folder):
        os.chown(parent, -1, gid)
        os.chmod(parent, 0o750)  # noqa: S103
        for name in names:
            os.chown(os.path.join(parent, name), -1, gid)
            os.chmod(os.path.join(parent, name), 0o640)


def shared_group(group: str) -> int:
    """Return the gid of the group in data.cache_group."""
    try:
        return group_id(group)
    except KeyError:
        remedy = "name a group of this machine that you belong to; `id` lists them"
        raise DataError("there is no such group", "data.cache_group", group, remedy) from None


def require_cache(folder: Path, group: str | None = None) -> None:
    """Reject a folder of the launcher's cache that other users could change; `group` is one that intentionally shares it."""
    trust = Trust.from_environ(os.environ)
    trust = trust if group is None else replace(trust, gids=trust.gids | {shared_group(group)})
    # The folder is checked again once it exists.
    if problem := _cache_problem(folder, folder.exists(), trust):
        raise DataError(problem)


@functools.cache
def _cache_problem(folder: Path, exists: bool, trust: Trust) -> Problem | None:
    problem = folder_problem("this cache", folder, trust)
    if problem is None:
        return None
    elsewhere = "set LAUNCHER_CACHE to a folder of your own, or share one in a group with data.cache_group"
    return Problem(problem.message, problem.where, problem.value, f"{elsewhere}; {problem.remedy}")


def make_private_folder(folder: Path, where: str) -> None:
    """Create an empty folder that only this user can enter, replacing their earlier one; `where` names its setting.

    Several processes of this user may call this at the same time, before any of them writes to it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private_folder(folder):
        remedy = "remove it, or set another folder; a sticky folder above it (chmod +t) keeps others from replacing yours"
        message = "the folder exists already, and this user cannot empty it: another user may have created it"
        raise ConfigError(message, where=where, value=f"{folder}: {describe_permissions(folder)}", remedy=remedy)


def is_private_folder(folder: Path) -> bool:
    """Return whether this is a folder (not a link) that belongs to this user and that no other user can enter."""
    with suppress(OSError):
        status = folder.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return False


def is_writable(folder: Path) -> bool:
    """Return whether the folder, or its closest existing parent, is writable."""
    existing = next((path for path in (folder, *folder.parents) if os.path.exists(path)), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


@functools.cache
def temporary_folder(parent: str | None = None) -> Path:
    """Return a folder in `parent`, by default TMPDIR, for temporary files and compiled kernels of this user only.

    Libraries load code from folders of known names in TMPDIR. Later processes find the folder again, unless another user took it.
    """
    folder = Path(parent or tempfile.gettempdir())
    if folder.name != (name := f"launcher-{os.geteuid()}"):
        folder /= name
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder if is_private_folder(folder) else Path(tempfile.mkdtemp(prefix="launcher-"))


def private_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a process of a run: TMPDIR, and folders in it for libraries if the home directory is read-only."""
    folder = temporary_folder(environ.get("TMPDIR"))
    variables = {"TMPDIR": str(folder)}
    caches = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "/") / ".cache")
    if not is_writable(caches):
        variables |= {name: str(folder / name.lower()) for name in _HOME_CACHES if not environ.get(name)}
        caches = folder
    # torch itself sets it to a folder in the temporary one, which later jobs may not find again.
    if Path(environ.get(_INDUCTOR, "torchinductor_")).name.startswith("torchinductor_"):
        variables[_INDUCTOR] = str(caches / "torchinductor")
    return variables
