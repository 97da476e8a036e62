"""Whom a command trusts: the files that decide what it runs belong to this user, to root, or to an owner who was named.

Whoever can replace such a file decides what the command does with this user's account and keys. The rules are those of ssh for
its files: owner and write permissions of each file, and of the folders above it; a sticky folder such as /tmp may be writable.
"""

from __future__ import annotations

import grp
import itertools
import os
import pwd
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import ConfigError, DataError, Problem, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.security.path_steps import path_steps

FLAG = "--trust-owner"
VARIABLE = "LAUNCHER_TRUST_OWNERS"
# Words of the flag and the variable that are no users.
_ANYONE, _GROUP = "anyone", "group:"
# Tries to make a folder that other processes of this user make at the same time.
_NUM_TRIES = 20
# User ids in the map of a namespace that maps all of them; the last number stands for no user.
_NUM_UIDS = 2**32 - 1
_OTHERS_SEARCH = stat.S_IXGRP | stat.S_IXOTH


@dataclass(frozen=True)
class Trust:
    """The users and groups whose files are accepted; with `anyone`, all files are."""

    uids: frozenset[int]
    gids: frozenset[int] = frozenset()
    anyone: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Trust:
        """Return this user, root, and the owners in LAUNCHER_TRUST_OWNERS: names or numbers of users, group:NAME, or anyone.

        Raises:
            ConfigError: with the names that this machine does not know.
        """
        uids, gids, anyone, problems = {os.geteuid(), 0}, set(), False, []
        for name in filter(None, (part.strip() for part in environ.get(VARIABLE, "").split(","))):
            try:
                if name == _ANYONE:
                    anyone = True
                elif name.startswith(_GROUP):
                    gids.add(group_id(name.removeprefix(_GROUP)))
                else:
                    uids.add(int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid)
            except KeyError:
                remedy = "write the name or the number of a user, or group:NAME, as `ls -l` and `ls -ln` show them"
                problems.append(Problem("there is no such user or group on this machine", f"{FLAG} or {VARIABLE}", name, remedy))
        if problems:
            raise ConfigError(problems)
        return cls(frozenset(uids), frozenset(gids), anyone)

    def with_group(self, gid: int | None) -> Trust:
        """Return this trust and that in the members of a group, for what they share on purpose."""
        return self if gid is None else replace(self, gids=self.gids | {gid})

    def accepts_owner(self, uid: int) -> bool:
        return uid in self.uids or any(_is_member(uid, gid) for gid in self.gids)

    def accepts_group(self, gid: int, owner: int) -> bool:
        """Return whether the members of a group may write to a file of `owner`."""
        # Storage of Kubernetes belongs to root and to the group of the pods' user.
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
    """Return the number of a group that is given by name or number.

    Raises:
        KeyError: if this machine has no group of that name.
    """
    return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid


def require_run(run: RunDir) -> None:
    """Refuse a run that others could have changed, before its plan or its code is used.

    Raises:
        SubmitError: with the file or folder, its owner and the remedy.
    """
    if problem := run_problem(run):
        raise SubmitError(problem)


def require_records(run: RunDir) -> None:
    """Refuse a run whose records others could have changed, before a command acts on the process or job that they name.

    Raises:
        SubmitError: with the file or folder, its owner and the remedy.
    """
    if problem := records_problem(run):
        raise SubmitError(problem)


def run_problem(run: RunDir) -> Problem | None:
    """Return why this user does not trust a run's directory, plan, code, records and the folders above them; None if they do."""
    return _problem(f"the run {run.root.name}", run.root, _code_and_records(run), _own_trust(), with_parents=True)


def records_problem(run: RunDir) -> Problem | None:
    """Return why this user does not trust the records of a run, which name its processes, jobs and addresses; None if they do."""
    return _problem(f"the run {run.root.name}", run.root, _records(run), _own_trust())


def place_problem(run: RunDir) -> Problem | None:
    """Return why this user would not trust a run that is made in this place; None if nobody else could replace it there."""
    return _problem(f"the run {run.root.name}", run.root, (), _own_trust(), with_parents=True)


def file_problem(subject: str, file: Path) -> Problem | None:
    """Return why this user does not trust a file, or a folder or link on the way to it; None if they do."""
    trust = _own_trust()
    *above, target = path_steps(file)
    weaknesses = itertools.chain(*(_weakness(step, trust, is_above=True) for step in above), _weakness(target, trust))
    if trust.anyone or (weakness := next(weaknesses, None)) is None:
        return None
    path, fact, remedy = weakness
    return Problem(f"{subject} is not trusted: {path} {fact}", str(file), _permissions(path), remedy)


def require_plain_files(run: RunDir) -> None:
    """Refuse another user's run with a pipe or a device among its files: to read one could wait forever.

    Raises:
        SubmitError: with the file.
    """
    if _own_trust().accepts_owner(run.root.stat().st_uid):
        return
    manifests = run.checkpoints.glob("step-*/manifest.json")
    for path in (*_records(run), run.metrics, run.events, *run.attempts.glob("[0-9]*/*.log"), *manifests):
        with suppress(OSError):
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                message = "a file of this run, which belongs to another user, is a pipe or a device, and is not read"
                raise SubmitError(message, where=str(path), remedy="ask the owner of the run")


def require_cache(path: Path, group: str | None = None) -> None:
    """Refuse a file or folder of the launcher's cache that others could have written.

    `group` names the group that shares the cache on purpose.

    Raises:
        DataError: with the file or folder, its owner and the remedy.
    """
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        # What cannot be read is not used.
        return
    trust = _own_trust().with_group(None if group is None else shared_group(group))
    content = _tree(path) if is_folder else ()
    if problem := _problem("this part of the cache", path, content, trust, is_private=_is_private(path.parent, trust)):
        elsewhere = "set LAUNCHER_CACHE to a folder of your own, or share one in a group with data.cache_group"
        raise DataError(replace(problem, remedy=f"{elsewhere}; {problem.remedy}"))


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
        trust = _own_trust().with_group(gid)
        if problem := _problem("this part of the cache", folder, (), trust):
            raise DataError(problem) from None
        return
    os.chown(folder, -1, gid)
    folder.chmod(0o3770)


def share(folder: Path, group: str) -> None:
    """Let the members of a group read a folder with its content."""
    gid = shared_group(group)
    for path in (folder, *_tree(folder)):
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
    raise ConfigError(message, where=where, value=f"{folder}: {_permissions(folder)}", remedy=remedy)


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


def _own_trust() -> Trust:
    return Trust.from_environ(os.environ)


def _records(run: RunDir) -> Iterator[Path]:
    yield from (run.plan, run.status, run.alive, run.plans, run.attempts)
    yield from run.plans.glob("*.json")
    for attempt in run.attempts.glob("[0-9]*"):
        yield attempt
        yield from attempt.glob("*.json")


def _code_and_records(run: RunDir) -> Iterator[Path]:
    yield from _records(run)
    yield from (run.code, *_tree(run.code), run.checkpoints)
    # The digests in a checkpoint's manifest cover its files.
    for checkpoint in run.checkpoints.glob("step-*"):
        yield from (checkpoint, checkpoint / "manifest.json")


def _tree(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files))


def _is_private(folder: Path, trust: Trust) -> bool:
    """Return whether nobody else can enter a folder, so that the permissions of what lies in it do not matter."""
    status = folder.stat()
    return trust.accepts_owner(status.st_uid) and not status.st_mode & _OTHERS_SEARCH


def _is_private_and_empty(folder: Path) -> bool:
    """Return whether this is a folder, and no link, that belongs to this user and that no other user can enter."""
    status = folder.lstat()
    is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return is_private and not any(folder.iterdir())


def _problem(
    subject: str, root: Path, content: Iterable[Path], trust: Trust, with_parents: bool = False, is_private: bool = False
) -> Problem | None:
    """Return the first reason not to trust `root` and its content, with the number of others; None if there is none.

    `is_private`: nobody else can enter the folder above.
    """
    if trust.anyone:
        return None
    first, num_others = None, 0
    for path, fact, remedy in _weaknesses(root, content, trust, with_parents, is_private):
        if first is not None:
            num_others += 1
            continue
        name = path.relative_to(root) if path.is_relative_to(root) and path != root else path
        first = Problem(f"{subject} is not trusted: {name} {fact}", str(path), _permissions(path), remedy)
    if first is None or not num_others:
        return first
    return replace(first, value=f"{first.value}; {num_others:,} more in this folder" if num_others else first.value)


def _weaknesses(
    root: Path, content: Iterable[Path], trust: Trust, with_parents: bool, is_private: bool
) -> Iterator[tuple[Path, str, str]]:
    """Yield each path that others own or can write to, with what is wrong and the remedy."""
    if with_parents:
        for parent in reversed(root.resolve().parents):
            yield from _weakness(parent, trust, is_above=True)
    yield from _weakness(root, trust, is_private=is_private)
    # What is in a folder that nobody else can enter may have any permissions.
    with suppress(OSError):
        is_private = is_private or _is_private(root, trust)
        for path in content:
            yield from _weakness(path, trust, is_private=is_private)
            if path.is_symlink():
                target = path.resolve()
                for above in reversed(target.parents):
                    yield from _weakness(above, trust, is_above=True)
                yield from _weakness(target, trust)


def _weakness(path: Path, trust: Trust, is_above: bool = False, is_private: bool = False) -> Iterator[tuple[Path, str, str]]:
    try:
        status = path.lstat()
    except OSError:
        # Of records that do not exist, nothing is used.
        return
    is_outside = is_above and status.st_uid == _uid_of_unmapped_users()
    if not trust.accepts_owner(status.st_uid) and not is_outside:
        user = _user(status.st_uid)
        yield path, f"belongs to {user}", f"if you trust {user} with your account, add {FLAG} {user}, or set {VARIABLE}={user}"
        return
    mode = status.st_mode
    # A link has no permissions of its own. In a sticky folder others can neither rename nor remove what they do not own.
    if stat.S_ISLNK(mode) or is_private or (is_above and mode & stat.S_ISVTX):
        return
    sticky = f" (chmod +t {path} is enough for a folder that several users share)" if is_above else ""
    if mode & stat.S_IWOTH:
        anyone = f"where storage shows such permissions for all files and only you use the machine, set {VARIABLE}={_ANYONE}"
        yield path, "can be written by everyone", f"chmod o-w {path}{sticky}; {anyone}"
    elif mode & stat.S_IWGRP and not trust.accepts_group(status.st_gid, status.st_uid):
        group = _group(status.st_gid)
        on_purpose = f"if you trust all members of the group with your account, add {FLAG} {_GROUP}{group}"
        remedy = f"chmod g-w {path}; {on_purpose}"
        if is_above:
            # Folders above often belong to somebody else, who alone can change their permissions.
            owner = _user(status.st_uid)
            remedy = f"{on_purpose}, or set {VARIABLE}={_GROUP}{group}; or let {owner}, its owner, run chmod +t {path}"
        yield path, f"can be written by the group {group}", remedy


def _permissions(path: Path) -> str:
    status = path.lstat()
    owner = f"{_user(status.st_uid)} ({status.st_uid}), group {_group(status.st_gid)} ({status.st_gid})"
    return f"owner {owner}, mode {stat.S_IMODE(status.st_mode):04o}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _uid_of_unmapped_users() -> int | None:
    """Return the uid that files of users outside this user namespace show; None where every user is mapped, as on a host.

    In containers without root (podman, Apptainer, enroot) these are root of the host and its other users.
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


def _is_private_group(gid: int, uid: int) -> bool:
    """Return whether a group is the one that many systems create for each user, of the same name and without other members."""
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    return (user.pw_gid, user.pw_name) == (gid, group.gr_name) and set(group.gr_mem) <= {user.pw_name}
