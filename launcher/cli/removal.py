"""The verbs `rm` and `clean`: remove runs, and parts of the cache that no unfinished run uses, after a question."""

from __future__ import annotations

import argparse
import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint import store
from launcher.checkpoint.store import disk_bytes
from launcher.cli.follow import wandb_page
from launcher.cli.render import terminal
from launcher.cli.render.sections import Rows, Section, Table, Text
from launcher.cli.status import find_living_problem
from launcher.data.cache_dir import cache_root, own_hub_cache, shared_cache_root
from launcher.errors import EXIT_FAILED, EXIT_REFUSED, LauncherError, Problem, SubmitError
from launcher.plan.quantities import format_count, format_size
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, locks, run_store
from launcher.runs.run_records import MirrorRecord
from launcher.runs.run_store import plan_remedy
from launcher.security import folders
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking.jsonl import read_events
from launcher.tracking.metrics import format_age

_STEPS_SHOWN = 8
_CHECKS = ("isolation-checks", "weight-checks", "deepspeed-checks")
_RUNS_SHOWN = 3


@dataclass(frozen=True)
class RemovableRun:
    """What is removed with a run, in bytes, its copies elsewhere, and the runs that start from its weights."""

    name: str
    dir: str
    state: str
    bytes: int
    steps: tuple[int, ...]
    has_export: bool
    copies: tuple[str, ...]
    wandb: str | None
    needed_by: tuple[str, ...]


def remove_runs(arguments: argparse.Namespace) -> int:
    """Remove runs; returns 1 if any files could not be removed."""
    root = arguments.root
    runs = _find_runs(arguments.runs, root)
    removable = [_inspect_run(one, root, {run.root for run in runs}) for one in runs]
    problems = [problem for one in runs if (problem := find_living_problem(one))]
    problems += [
        Problem(
            f"other runs start from the weights of the run {one.name}",
            where=one.dir,
            value=", ".join(one.needed_by),
            remedy="remove them first, or name them in the same command; --even-if-needed removes this run anyway: "
            "they can then be resumed only from their own checkpoints",
        )
        for one in removable
        if one.needed_by and not arguments.even_if_needed
    ]
    if problems:
        raise SubmitError(problems)
    if not arguments.json:
        terminal.show(*(Section("", [_list_rows(one)]) for one in removable))
        print()
    total = f"{format_count(len(removable), 'run')}, {format_size(sum(one.bytes for one in removable))}"
    if not _is_confirmed(arguments, f"remove {total}?"):
        return EXIT_REFUSED
    left = [] if arguments.dry_run else [path for one in runs for path in _remove_run(one)]
    for link in () if arguments.dry_run else (path for name in arguments.runs for path in (root / name, Path(name))):
        # A run was named by a link to its directory.
        if link.is_symlink() and os.path.realpath(link) in {one.dir for one in removable}:
            link.unlink()
    values = {"runs": [asdict(one) for one in removable], "removed": not arguments.dry_run, "left": left}
    return _report_removal(arguments, values, total, f"; data and models stay in the cache: {launcher_command('clean')}")


def _find_runs(names: list[str], root: Path) -> list[RunDir]:
    """Return the runs with these names; their plans may be damaged or missing."""
    runs: dict[Path, RunDir] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            run = run_store.find_run(name, root, markers=("plan.json", "status.json"))
        except LauncherError as error:
            problems += error.problems
            continue
        problems += filter(None, [folders.run_problem(run.root)])
        runs[run.root] = run
    if problems:
        raise SubmitError(problems)
    return list(runs.values())


def _inspect_run(run: RunDir, root: Path, together: Collection[Path]) -> RemovableRun:
    """Describe a run; `together` are the directories of the runs that the same command removes."""
    state, events = "unknown", read_events(run.events)
    with suppress(LauncherError):
        status = run_store.read_status(run)
        state = f"{status.state}, at step {status.step:,}" + (f" of {status.max_steps:,}" if status.max_steps else "")
    copies = []
    with suppress(LauncherError):
        records = (run.attempt(number) / "mirror.json" for number in reversed(run_store.attempt_numbers(run)))
        if mirror := next(filter(None, (json_records.read_if_present(MirrorRecord, path) for path in records)), None):
            copies.append(f"the mirror {mirror.url} has the steps {', '.join(map(str, mirror.steps[-_STEPS_SHOWN:])) or 'none'}")
    urls = [url for event in events if event["kind"] == "export" and (url := event["fields"].get("url"))]
    copies += [f"the Hub has the export: {url}" for url in urls[-1:]]
    folders = {folder.resolve(): folder for folder in (root, run.root.parent)}
    others = {other.root.resolve(): other for folder in folders.values() for other in run_store.list_runs(folder)}
    needed_by = (str(other.root) for path, other in others.items() if path not in together and _starts_from(other, run.root))
    return RemovableRun(
        name=run.root.name,
        dir=str(run.root),
        state=state,
        bytes=disk_bytes(run.root),
        steps=tuple(checkpoint.step for checkpoint in store.list_checkpoints(run.checkpoints)),
        has_export=run.export.is_dir(),
        copies=tuple(copies),
        wandb=wandb_page(events).get("url") or None,
        needed_by=tuple(needed_by),
    )


def _starts_from(other: RunDir, folder: Path) -> bool:
    """Return whether a run's initial weights or tokenizer come from the run in `folder`."""
    # The plan of another user's run may contain anything, even values that are not paths.
    with suppress(LauncherError, OSError, ValueError, TypeError, AttributeError):
        plan = run_store.read_plan_values(run_store.newest_plan_path(other))
        paths = ((plan.get("lineage") or {}).get("run_dir"), plan["model"].get("path"), plan["model"].get("tokenizer_path"))
        return any(Path(os.path.realpath(path)).is_relative_to(folder) for path in paths if path)
    return False


def _list_rows(one: RemovableRun) -> Rows:
    """Return what is removed and what stays."""
    more = f" and {len(one.steps) - _STEPS_SHOWN} older" if len(one.steps) > _STEPS_SHOWN else ""
    rows = [
        ("run", f"{one.name} in {short_path(Path(one.dir))}"),
        ("state", one.state),
        ("size", format_size(one.bytes)),
        ("checkpoints", f"{', '.join(map(str, one.steps[-_STEPS_SHOWN:])) or 'none'}{more}"),
        ("export", "yes" if one.has_export else "none"),
        ("copies", "; ".join(one.copies) or "none known: what is removed is gone"),
        *([("W&B", f"{one.wandb} stays")] if one.wandb else []),
        *([("needed by", ", ".join(one.needed_by))] if one.needed_by else []),
    ]
    return Rows(rows)


def _remove_run(run: RunDir) -> Iterator[str]:
    """Remove a run, and what interrupted removals left beside it; yields the files that could not be removed."""
    removing = run.root.with_name(f"{atomic_files.REMOVING_PREFIX}{run.root.name}")
    # The rename is under the lock with which attempts are started.
    with run_store.start_lock(run):
        if problem := find_living_problem(run):
            raise SubmitError(problem)
        yield from _remove_path(removing)
        atomic_files.rename(run.root, removing)
        yield from _remove_path(removing)


@dataclass
class CacheEntry:
    """A part of the cache that is removed as a whole; `lock` is held while it is built, `kept` is why it stays, or empty."""

    kind: str
    path: str
    bytes: int
    used_at: float
    lock: Path
    runs: tuple[str, ...] = ()
    kept: str = ""


def clean_cache(arguments: argparse.Namespace) -> int:
    """Remove parts of the cache; returns 1 if files could not be removed."""
    entries = list_entries([Path(root).expanduser() for root in arguments.root or ["runs"]], arguments.shared)
    entries = [entry for entry in entries if not arguments.only or entry.kind in arguments.only]
    oldest = time.time() - arguments.older_than
    chosen = [entry for entry in entries if not entry.kept and entry.used_at < oldest]
    size = format_size(sum(entry.bytes for entry in chosen))
    if not arguments.json:
        terminal.show(*_list_cache(entries, chosen))
        if entries:
            print()
        if not chosen:
            print("nothing to remove")
            return 0
    if chosen and not _is_confirmed(arguments, f"remove {len(chosen)} of {format_count(len(entries), 'part')}, {size}?"):
        return EXIT_REFUSED
    left = [] if arguments.dry_run else [line for entry in chosen for line in _remove_entry(entry)]
    listed = [{name: value for name, value in asdict(entry).items() if name != "lock"} for entry in entries]
    values = {"entries": listed, "chosen": [entry.path for entry in chosen], "left": left}
    return _report_removal(arguments, values, f"{format_count(len(chosen), 'part')}, {size}")


def list_entries(roots: Iterable[Path], shared: bool) -> list[CacheEntry]:
    """List this user's cache entries, ordered by last use, oldest first.

    `roots` are the folders of runs that may use the cache. Data caches that a group shares are kept unless `shared`: the other
    members' runs are unknown.

    Raises:
        SubmitError: if an unfinished run's plan is unreadable, so that it is unknown what the run uses.
    """
    users, entries = list(_list_users(roots)), list(_find_entries(shared))
    for entry in entries:
        folder = os.path.realpath(entry.path)
        used_by = [(run, state) for run, state, paths in users if any(Path(path).is_relative_to(folder) for path in paths)]
        entry.runs = tuple(run for run, _ in used_by)
        if _is_locked(entry.lock):
            holder = locks.read_holder(entry.lock)
            entry.kept = f"being built by process {holder.pid} on {holder.host}" if holder is not None else "being built"
        elif unfinished := [f"{Path(run).name} ({state})" for run, state in used_by if state != "completed"]:
            entry.kept = f"used by {', '.join(unfinished)}"
    return sorted(entries, key=lambda entry: entry.used_at)


def _list_users(roots: Iterable[Path]) -> Iterator[tuple[str, str, set[str]]]:
    """Yield the directory, the state and the absolute paths in the plans of each run of this user."""
    for run in {run.root.resolve(): run for root in roots for run in run_store.list_runs(root)}.values():
        # Other users' runs use their own caches, or a group's, which are kept.
        if not folders.accepts_owner(run.root.stat().st_uid):
            continue
        state, paths = "unknown", set[str]()
        with suppress(LauncherError):
            state = run_store.read_status(run).state
        for path in (run.plan, *run_store.changed_plan_paths(run)):
            try:
                paths |= set(_find_paths(run_store.read_plan_values(path)))
            except LauncherError:
                if state != "completed":
                    message = "the plan of a run cannot be read, so what it uses is unknown"
                    remedy = f"{plan_remedy(path)}, or remove the run: {launcher_command('rm', run.root)}"
                    raise SubmitError(Problem(message, str(path), remedy=remedy)) from None
        yield str(run.root.absolute()), state, paths


def _find_paths(part: Any) -> Iterator[str]:
    """Yield all absolute paths in a plan: data caches of all splits, model, tokenizer, and whatever plans add."""
    if isinstance(part, dict | list):
        for value in part.values() if isinstance(part, dict) else part:
            yield from _find_paths(value)
    elif isinstance(part, str) and part.startswith("/"):
        yield os.path.realpath(part)


def _find_entries(shared: bool) -> Iterator[CacheEntry]:
    root = cache_root()
    groups = sorted((shared_cache_root() or root).glob("data-?*"))
    folders = [("data", root / "data"), *(("data", folder) for folder in groups), ("models", root / "models")]
    folders += [("hub", root / own_hub_cache().name), ("sources", root / "sources"), ("scores", root / "scores")]
    for kind, folder in folders:
        # Another user may have put a link among the folders of groups.
        for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
            key = path.name.removesuffix(".partial")
            if path.name.endswith((".lock", ".lock.json")):
                continue
            if kind == "data":
                lock = folder / (f"{key}.lock" if folder not in groups else f"{key}-{os.geteuid()}.lock")
            else:
                lock = path / ".lock" if kind == "sources" else folder / f".{key}.lock"
            entry = _read_entry(kind, path, lock)
            if entry is not None and folder in groups and not shared:
                entry.kept = f"shared with the group {folder.name.removeprefix('data-')}"
            yield from filter(None, [entry])
    yield from filter(None, (_read_entry("checks", root / name, root / f".{name}.lock") for name in _CHECKS))


def _read_entry(kind: str, path: Path, lock: Path) -> CacheEntry | None:
    """Return an entry with its size and when any of its files was last read or written; None if it is not this user's.

    Storage without access times (noatime) shows the time of the last write; commands that use an entry, and checkpoints of runs,
    touch its folder.
    """
    num_bytes = 0
    try:
        status = path.lstat()
    except OSError:
        return None
    used_at = status.st_mtime
    inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    for file in inside if path.is_dir() and not path.is_symlink() else [path]:
        with suppress(OSError):
            file_status = file.lstat()
            num_bytes += file_status.st_size
            used_at = max(used_at, file_status.st_atime, file_status.st_mtime)
    return CacheEntry(kind, str(path), num_bytes, used_at, lock) if status.st_uid == os.geteuid() else None


def _is_locked(lock: Path) -> bool:
    """Return whether a process holds a lock file; does not change the file."""
    with suppress(OSError), open(lock, "rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _remove_entry(entry: CacheEntry) -> list[str]:
    """Remove an entry; returns what could not be removed, with the reasons."""
    try:
        with open(entry.lock, "rb+") if entry.lock.exists() else nullcontext() as lock:
            if lock is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _remove_path(Path(entry.path))
    except BlockingIOError:
        return [f"{entry.path}: another process began to build it"]
    except OSError as error:
        return [f"{error.filename or entry.path}: {error.strerror or error}"]


def _list_cache(entries: Sequence[CacheEntry], chosen: Sequence[CacheEntry]) -> list[Table | Text]:
    """Return the table of the entries and their total."""
    if not entries:
        return [Text("the cache is empty")]
    rows = []
    for entry in entries:
        names = [Path(run).name for run in entry.runs]
        more = f" and {len(names) - _RUNS_SHOWN} more" if len(names) > _RUNS_SHOWN else ""
        action = f"keep: {entry.kept}" if entry.kept else "remove" if entry in chosen else "keep"
        age = f"{format_age(entry.used_at)} ago"
        cells = (entry.path, entry.kind, format_size(entry.bytes), age, ", ".join(names[:_RUNS_SHOWN]) + more or "-", action)
        rows.append(cells)
    table = Table(("path", "kind", "size", "last use", "runs", "action"), rows, numbers=(2, 3))
    return [table, Text(f"in all {format_size(sum(entry.bytes for entry in entries))}")]


def _report_removal(arguments: argparse.Namespace, values: dict[str, Any], total: str, kept: str = "") -> int:
    """Print what was removed, `values` as JSON, and what could not be; returns the exit code."""
    if arguments.json:
        print(terminal.as_json(values))
    elif arguments.dry_run:
        print(f"{total}: nothing was removed, because of --dry-run")
    elif not values["left"]:
        print(f"removed {total}{kept}")
    for path in values["left"]:
        print(f"not removed: {path}", file=sys.stderr)
    return EXIT_FAILED if values["left"] else 0


def _is_confirmed(arguments: argparse.Namespace, question: str) -> bool:
    """Return whether a command continues, and report if it does not; --yes and --dry-run need no answer."""
    if arguments.yes or arguments.dry_run:
        return True
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        remedy = f"to remove it without a question: {launcher_command(*arguments.command, '--yes')}"
        raise SubmitError("nothing was removed: there is no terminal to ask on", where="command line", remedy=remedy)
    if terminal.read_yes(question):
        return True
    print("nothing was removed")
    return False


def _remove_path(path: Path) -> list[str]:
    """Remove a file, a link or a folder without following links; returns what could not be removed, with the reasons."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return []
    if not path.name.startswith(atomic_files.REMOVING_PREFIX):
        path = path.rename(path.with_name(f"{atomic_files.REMOVING_PREFIX}{secrets.token_hex(8)}"))
    left: list[str] = []

    def keep(_: object, failed: str, failure: tuple[type[BaseException], BaseException, object]) -> None:
        error = failure[1]
        # The content of a folder that could not be removed is reported itself.
        if (
            isinstance(error, OSError)
            and not isinstance(error, FileNotFoundError)
            and not (os.path.isdir(failed) and os.listdir(failed))
        ):
            left.append(f"{failed}: {error.strerror}")

    shutil.rmtree(path, onerror=keep)
    return left
