"""Who owns files and who can write to them, in folders and along links: the basis on which a command trusts them.

The rules are ssh's: they check the owner and write permissions of each file and its parent folders; a sticky folder such as /tmp
may be writable. A file that does not exist is as safe as its closest parent folder: whoever can create files there, even in a
sticky folder, can create it after the check.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher.errors import Problem
from launcher.security.acl import has_acl, read_writers
from launcher.security.path_steps import path_steps
from launcher.security.trust import ANYONE, FLAG, GROUP_PREFIX, VARIABLE, Trust, group_name, uid_of_unmapped_users, user_name

_OTHERS_SEARCH = stat.S_IXGRP | stat.S_IXOTH


def tree(folder: Path) -> Iterator[Path]:
    """Yield the files, links and folders in a folder, without following links. Unreadable folders are empty.

    The folders may be nested to any depth, which os.walk cannot handle in Python 3.11.
    """
    pending = [os.fspath(folder)]
    while pending:
        entries = list[os.DirEntry[str]]()
        with suppress(OSError), os.scandir(pending.pop()) as listed:
            entries += listed
        for entry in entries:
            yield Path(entry.path)
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)


def is_private(folder: Path, trust: Trust) -> bool:
    """Return whether no other user can enter a folder, so that the permissions of its content do not matter."""
    status = folder.stat()
    return trust.accepts_owner(status.st_uid) and not status.st_mode & _OTHERS_SEARCH


def first_problem(
    subject: str,
    root: Path,
    content: Iterable[Path],
    trust: Trust,
    with_parents: bool = False,
    in_private_folder: bool = False,
    may_be_hidden: bool = False,
) -> Problem | None:
    """Return the first reason not to trust `root` and its content, with the number of further reasons, or None.

    `with_parents` includes the parent folders; with `may_be_hidden`, what lies in one that no other user can enter may have any
    mode. `in_private_folder` means that no other user can enter the parent folder.
    """
    return _first(subject, root, _weaknesses(root, content, trust, with_parents, in_private_folder, may_be_hidden), trust)


def first_problem_above(subject: str, folder: Path, trust: Trust, may_be_hidden: bool = False) -> Problem | None:
    """Return the first reason not to trust what will be created in `folder` (other users could replace it), or None.

    With `may_be_hidden`, folders inside one that no other user can enter may have any mode.
    """

    return _first(subject, folder, _weaknesses_above(path_steps(folder), trust, set(), may_be_hidden), trust)


def first_problem_of_cache(subject: str, folder: Path, content: Iterable[Path], trust: Trust) -> Problem | None:
    """Return the first reason not to trust a cache and its content, which this user may create later, or None.

    Content of a folder that only this user can enter, such as a home directory, may have any mode: no other user can reach it.
    """
    if problem := first_problem_above(subject, folder, trust, may_be_hidden=True):
        return problem
    is_hidden = False
    with suppress(OSError, RuntimeError):
        is_hidden = any(is_private(parent, trust) for parent in folder.resolve().parents if parent.is_dir())
    return first_problem(subject, folder, content, trust, in_private_folder=is_hidden)


def describe_permissions(path: Path) -> str:
    """Return the owner, the group and the mode of a file."""
    status = path.lstat()
    owner = f"{user_name(status.st_uid)} ({status.st_uid}), group {group_name(status.st_gid)} ({status.st_gid})"
    acl = " and an ACL, which `getfacl` shows" if not stat.S_ISLNK(status.st_mode) and has_acl(path) else ""
    return f"owner {owner}, mode {stat.S_IMODE(status.st_mode):04o}{acl}"


def _first(subject: str, root: Path, weaknesses: Iterable[tuple[Path, str, str]], trust: Trust) -> Problem | None:
    if trust.anyone:
        return None
    first, num_others = None, 0
    # Several missing files share their closest existing folder.
    for path, fact, remedy in dict.fromkeys(weaknesses):
        if first is not None:
            num_others += 1
            continue
        name = path.relative_to(root) if path.is_relative_to(root) and path != root else path
        first = Problem(f"{subject} is not trusted: {name} {fact}", str(path), describe_permissions(path), remedy)
    if first is None or not num_others:
        return first
    return replace(first, value=f"{first.value}; {num_others:,} more in this folder")


def _weaknesses_above(
    steps: Iterable[Path], trust: Trust, hiding: set[Path], may_be_hidden: bool
) -> Iterator[tuple[Path, str, str]]:
    """Yield the weaknesses of folders and links on the way to a path, except for modes behind a folder of `hiding`.

    With `may_be_hidden`, adds the folders that no other user can enter to `hiding`.
    """
    for step in steps:
        yield from _weakness(step, trust, is_above=True, is_protected=not hiding.isdisjoint(step.parents))
        with suppress(OSError):
            if may_be_hidden and not step.is_symlink() and is_private(step, trust):
                hiding.add(step)


def _weaknesses(
    root: Path, content: Iterable[Path], trust: Trust, with_parents: bool, in_private_folder: bool, may_be_hidden: bool
) -> Iterator[tuple[Path, str, str]]:
    """Yield each path that other users own or can write to, with the problem and the remedy."""
    *above, own = path_steps(root)
    hiding = set[Path]()
    steps = above if with_parents else [root] if root.is_symlink() else []
    yield from _weaknesses_above(steps, trust, hiding, may_be_hidden and with_parents)
    in_private_folder = (in_private_folder and not root.is_symlink()) or not hiding.isdisjoint(own.parents)
    yield from _weakness(own, trust, is_protected=in_private_folder)
    checked = {*above, own}
    # Content of a folder that no other user can enter may have any permissions.
    with suppress(OSError):
        is_protected = in_private_folder or is_private(root, trust)
        for path in content:
            yield from _weakness(path, trust, is_protected=is_protected)
            if path.is_symlink():
                yield from _weaknesses_behind(path, trust, checked)


def _weaknesses_behind(link: Path, trust: Trust, checked: set[Path]) -> Iterator[tuple[Path, str, str]]:
    """Yield what other users own or can write to, along a link and in the folder that it leads to.

    `checked` holds paths that need no further check; paths that are checked here are added.
    """
    pending = [link]
    while pending:
        link = pending.pop()
        checked.add(link)
        *above, target = path_steps(link)
        for step in above:
            if step not in checked:
                checked.add(step)
                yield from _weakness(step, trust, is_above=True)
        if target in checked:
            continue
        checked.add(target)
        yield from _weakness(target, trust)
        for path in tree(target):
            if path not in checked:
                checked.add(path)
                yield from _weakness(path, trust)
                if path.is_symlink():
                    pending.append(path)


def _weakness(path: Path, trust: Trust, is_above: bool = False, is_protected: bool = False) -> Iterator[tuple[Path, str, str]]:
    try:
        status = path.lstat()
    except FileNotFoundError:
        # A missing parent folder will be created by this user, and is checked again when it is used.
        if not is_above and not is_protected:
            yield from _weakness(next(parent for parent in path.parents if os.path.lexists(parent)), trust)
        return
    except OSError:
        # Unreachable files are not used.
        return
    mode = status.st_mode
    # A link has no permissions. In a sticky folder, other users can neither rename nor remove what they do not own.
    are_irrelevant = stat.S_ISLNK(mode) or is_protected or (is_above and bool(mode & stat.S_ISVTX))
    writers = [] if are_irrelevant else _distrusted_writers(path, status, trust)
    is_outside = is_above and status.st_uid == uid_of_unmapped_users()
    if not trust.accepts_owner(status.st_uid) and not is_outside:
        user = user_name(status.st_uid)
        yield path, f"belongs to {user}", _trust_remedy([user, *writers])
        return
    if are_irrelevant:
        return
    sticky = f" (chmod +t {path} is enough for a folder that several users share)" if is_above else ""
    if mode & stat.S_IWOTH:
        anyone = f"if the storage shows these permissions for all files and only you use the machine, set {VARIABLE}={ANYONE}"
        yield path, "can be written by everyone", f"chmod o-w {path}{sticky}; {anyone}"
    elif writers:
        on_purpose = _trust_remedy(writers)
        # For a file with an ACL, this removes write permission from all users and groups that the ACL names.
        remedy = f"chmod g-w {path}; {on_purpose}"
        if is_above:
            # Parent folders often belong to another user, and only that user can change their permissions.
            by = "run" if status.st_uid == os.geteuid() else f"ask {user_name(status.st_uid)}, its owner, to run"
            remedy = f"{on_purpose}; or {by} chmod +t {path}"
        yield path, f"can be written by {_describe_owners(writers, 'the group')}", remedy


def _distrusted_writers(path: Path, status: os.stat_result, trust: Trust) -> list[str]:
    """Return the users and groups that can write to a file but should not, in the format of LAUNCHER_TRUST_OWNERS."""
    writers = read_writers(path, status)
    users = [user_name(uid) for uid in writers.uids if not trust.accepts_owner(uid)]
    groups = [group_name(gid) for gid in writers.gids if not trust.accepts_group(gid, status.st_uid)]
    return [*users, *(f"{GROUP_PREFIX}{group}" for group in groups)]


def _trust_remedy(owners: list[str]) -> str:
    """Return how to accept files of these owners, given in the format of LAUNCHER_TRUST_OWNERS."""
    trusted, flags = _describe_owners(owners, "all members of the group"), " ".join(f"{FLAG} {owner}" for owner in owners)
    return f"if you trust {trusted} with your account, add {flags}, or set {VARIABLE}={','.join(owners)}"


def _describe_owners(owners: list[str], group_words: str) -> str:
    return " and ".join(
        f"{group_words} {owner.removeprefix(GROUP_PREFIX)}" if owner.startswith(GROUP_PREFIX) else owner for owner in owners
    )
