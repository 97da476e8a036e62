"""Whom a command trusts: files that decide what it runs must belong to this user, to root, or to a named owner.

Whoever can replace such a file controls what the command does with this user's account and keys.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher import json_records
from launcher.errors import DataError, Problem, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.security.folders import CACHE_PART, shared_group
from launcher.security.permissions import first_problem, first_problem_above, is_private, tree
from launcher.security.trust import Trust, user_name

# Files in another user's run: those that are read line by line, and the events, which are read as a whole.
_MAX_LOG_BYTES, _MAX_EVENTS_BYTES = 1 << 30, 16 << 20


def require_run(run: RunDir) -> None:
    """Reject a run that other users could have changed, before its plan or code is used.

    Raises:
        SubmitError: with the file or folder, its owner and the remedy.
    """
    if problem := run_problem(run):
        raise SubmitError(problem)


def require_records(run: RunDir) -> None:
    """Reject a run whose records other users could have changed, before a command acts on the process or job named in them.

    Raises:
        SubmitError: with the file or folder, its owner and the remedy.
    """
    if problem := records_problem(run):
        raise SubmitError(problem)


def run_problem(run: RunDir) -> Problem | None:
    """Return why this user does not trust a run's directory, plan, code, records or parent folders, or None if they do."""
    return first_problem(f"the run {run.root.name}", run.root, _code_and_records(run), _own_trust(), with_parents=True)


def records_problem(run: RunDir) -> Problem | None:
    """Return why this user does not trust a run's records, which name its processes, jobs and addresses, or None if they do."""
    return first_problem(f"the run {run.root.name}", run.root, _records(run), _own_trust())


def export_problem(run: RunDir) -> Problem | None:
    """Return why this user does not trust the weights in a trusted run's export, or None if they do."""
    trust, subject = _own_trust(), f"the export of {run.root.name}"
    with suppress(OSError):
        is_hidden = is_private(run.root, trust)
        return first_problem(subject, run.export, tree(run.export), trust, in_private_folder=is_hidden)
    return None


def location_problem(run: RunDir) -> Problem | None:
    """Return which parent folder of a run, existing or not, lets other users replace it, or None if none does."""
    folder = run.root.parent
    return first_problem_above(f"a run in {folder}", folder, _own_trust())


def require_location(run: RunDir) -> None:
    """Refuse to create a run where other users could replace it: the job would run what it finds there when it starts.

    Raises:
        SubmitError: with the folder, its owner and the remedy.
    """
    if problem := location_problem(run):
        remedy = f"set run.root to a folder that only you can write to; or {problem.remedy}"
        raise SubmitError(replace(problem, remedy=remedy))


def require_export_location(out: Path) -> None:
    """Refuse to write an export where other users could replace it, or put a link in place of the folder that is being written.

    Raises:
        SubmitError: with the folder, its owner and the remedy.
    """
    folder = out.parent
    if problem := first_problem_above(f"an export in {folder}", folder, _own_trust(), may_be_hidden=True):
        raise SubmitError(replace(problem, remedy=f"choose an --out that only you can replace; or {problem.remedy}"))


def file_problem(subject: str, file: Path, descriptor: int | None = None, may_be_hidden: bool = False) -> Problem | None:
    """Return why this user does not trust a file, or a folder or link on the way to it, or None if they do.

    With `descriptor`, the file must be the one that was opened before. With `may_be_hidden`, files and folders inside a folder
    that no other user can enter, such as a home directory, may have any mode.
    """
    problem = first_problem(subject, file, (), _own_trust(), with_parents=True, may_be_hidden=may_be_hidden)
    if problem is None and descriptor is not None and not _own_trust().anyone:
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return None
        problem = Problem(f"{subject} is not trusted: {file} was replaced while it was read", remedy="try again")
    return None if problem is None else replace(problem, where=str(file))


def folder_problem(subject: str, folder: Path, content: Iterable[Path], may_be_hidden: bool = False) -> Problem | None:
    """Return why this user does not trust a folder, a folder or link on the way to it, or `content`, or None if they do.

    With `may_be_hidden`, what lies inside a folder that no other user can enter may have any mode.
    """
    return first_problem(subject, folder, content, _own_trust(), with_parents=True, may_be_hidden=may_be_hidden)


def accepts_owner(uid: int) -> bool:
    """Return whether this user trusts files that a given user owns."""
    trust = _own_trust()
    return trust.anyone or trust.accepts_owner(uid)


def link_problem(path: Path, root: Path, run: Path | None = None) -> Problem | None:
    """Return why a run's path is not followed (it passes a link of another user, who would choose the run), or None.

    Links on the way to `root`, the folder of runs, are part of what the user typed, and so are links on any other path. `run` is
    the folder that the path led to before: in a sticky folder, other users can replace their own entries at any time.
    """
    is_within = path != root and path.is_relative_to(root)
    for step in itertools.takewhile(lambda step: step != root, (path, *path.parents)) if is_within else (path,):
        try:
            # Look only once: it may be something else a moment later.
            status = step.lstat()
        except FileNotFoundError:
            if run is None:
                continue
            return _replaced(step, run)
        if stat.S_ISLNK(status.st_mode) and not accepts_owner(status.st_uid):
            message = f"{step.name} is a link of {user_name(status.st_uid)}, who controls which run it points to"
            real = os.path.realpath(path if run is None else run)
            return Problem(message, str(step), real, f"name the run itself: {real}")
        if step == path and run is not None and not stat.S_ISLNK(status.st_mode) and not os.path.samestat(status, run.lstat()):
            return _replaced(step, run)
    return None


def _replaced(step: Path, run: Path) -> Problem:
    return Problem(f"{step.name} was replaced while it was being checked", str(step), str(run), f"name the run itself: {run}")


def require_own_links(path: Path, root: Path, run: RunDir) -> None:
    """Reject a run to act on if `path` leads to it through a link of another user; see `link_problem`.

    Raises:
        SubmitError: with the link.
    """
    # For another user's run, files are only shown; no command acts on it.
    if (problem := link_problem(path, root, run.root)) and accepts_owner(run.root.stat().st_uid):
        raise SubmitError(problem)


def require_plain_files(run: RunDir) -> None:
    """Reject another user's run if its files include a pipe, a device or an oversized file: reading one might never end.

    Raises:
        SubmitError: with the file.
    """
    if _own_trust().accepts_owner(run.root.stat().st_uid):
        return
    of_checkpoints = (run.checkpoints.glob(f"step-*/{name}") for name in ("manifest.json", "evaluation.json"))
    records = dict.fromkeys((*_records(run), *itertools.chain(*of_checkpoints)), json_records.MAX_BYTES)
    lines = {run.metrics: _MAX_LOG_BYTES, run.events: _MAX_EVENTS_BYTES}
    logs = dict.fromkeys(run.attempts.glob("[0-9]*/*.log"), _MAX_LOG_BYTES)
    for path, max_bytes in (records | lines | logs).items():
        with suppress(OSError):
            status, reason = path.stat(), ""
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                reason = "is a pipe or a device"
            elif status.st_size > max_bytes:
                kind = "record" if path in records else "file of its kind"
                reason = f"has {status.st_size / 2**20:,.0f} MiB, more than any {kind}"
            if reason:
                message = f"a file of this run, which belongs to another user, {reason}, and is not read"
                raise SubmitError(message, where=str(path), remedy="ask the owner of the run")


def require_cache(path: Path, group: str | None = None) -> None:
    """Reject a file or folder in the launcher's cache that other users could have written, or replaced through a parent folder.

    `group` names the group that intentionally shares the cache.

    Raises:
        DataError: with the file or folder, its owner and the remedy.
    """
    trust = _own_trust().with_group(None if group is None else shared_group(group))
    problem = first_problem_above(CACHE_PART, path.parent, trust, may_be_hidden=True)
    # Unreadable files are not used.
    with suppress(OSError):
        if problem is None:
            content = tree(path) if stat.S_ISDIR(path.stat().st_mode) else ()
            problem = first_problem(CACHE_PART, path, content, trust, in_private_folder=is_private(path.parent, trust))
    if problem is not None:
        elsewhere = "set LAUNCHER_CACHE to a folder of your own, or share one in a group with data.cache_group"
        raise DataError(replace(problem, remedy=f"{elsewhere}; {problem.remedy}"))


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
    yield from (run.code, *tree(run.code), run.checkpoints)
    # Slurm job tasks begin with a pickle there.
    yield from (run.jobs, *run.jobs.glob("*"), *run.jobs.glob("*/*.pkl"))
    # The digests in a checkpoint's manifest cover its files.
    for checkpoint in run.checkpoints.glob("step-*"):
        yield from (checkpoint, checkpoint / "manifest.json")
