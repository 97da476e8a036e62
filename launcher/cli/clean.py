"""The verb `clean`: list the content of the launcher's cache, and remove what no unfinished run uses."""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import locks, run_store
from launcher.cli import formatting
from launcher.cli.arguments import VerbParser
from launcher.cli.removal import add_flags, is_confirmed, remove_path
from launcher.data.cache_dir import cache_root, own_hub_cache, shared_cache_root
from launcher.errors import EXIT_FAILED, EXIT_REFUSED, LauncherError, Problem, SubmitError
from launcher.plan.quantities import format_count, format_size
from launcher.run_damage import plan_remedy
from launcher.security import owners
from launcher.shell_commands import launcher_command
from launcher.tracking.metrics import format_duration

KINDS: Mapping[str, str] = {
    "data": "tokenized rows",
    "models": "converted models, and weights of other runs",
    "hub": "downloads from the Hub, kept here if others can write to its own cache",
    "sources": "downloaded data files",
    "scores": "losses of documents under weights",
    "checks": "results of checks of models and settings, and words for completion",
}
_CHECKS = ("isolation-checks", "weight-checks", "deepspeed-checks", "completion")
_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
# In a narrow terminal, the first column gets its own line above the others.
_COLUMNS = ("path", "kind", ">size", ">last use", "runs", "action")
_RUNS_SHOWN = 3


@dataclass
class CacheEntry:
    """A part of the cache that is removed as a whole.

    `lock` is the file that a process holds while it builds the entry. `runs` are the directories of the runs that use it. `kept`
    is why it is not removed, or empty.
    """

    kind: str
    path: str
    bytes: int
    used_at: float
    lock: Path
    runs: tuple[str, ...] = ()
    kept: str = ""


def run(verb: str, tokens: list[str]) -> int:
    """Remove parts of the cache; returns 1 if files could not be removed."""
    arguments = _parser().parse_args(tokens)
    entries = list_entries([Path(root).expanduser() for root in arguments.root or ["runs"]], arguments.shared)
    entries = [entry for entry in entries if not arguments.only or entry.kind in arguments.only]
    oldest = time.time() - arguments.older_than
    chosen = [entry for entry in entries if not entry.kept and entry.used_at < oldest]
    total = format_size(sum(entry.bytes for entry in chosen))
    if not arguments.json:
        print("\n".join(_lines(entries, chosen)), end="\n\n" if entries else "\n")
    question = f"remove {len(chosen)} of {format_count(len(entries), 'part')}, {total}?"
    if chosen and not is_confirmed(arguments, question, (verb, *tokens)):
        return EXIT_REFUSED
    left = [] if arguments.dry_run else [line for entry in chosen for line in _remove(entry)]
    if arguments.json:
        listed = [{name: value for name, value in asdict(entry).items() if name != "lock"} for entry in entries]
        print(formatting.as_json({"entries": listed, "chosen": [entry.path for entry in chosen], "left": left}))
    elif not chosen:
        print("nothing to remove")
    elif arguments.dry_run:
        print(f"{format_count(len(chosen), 'part')}, {total}: nothing was removed, because of --dry-run")
    elif not left:
        print(f"removed {format_count(len(chosen), 'part')}, {total}")
    for line in left:
        print(f"not removed: {line}", file=sys.stderr)
    return EXIT_FAILED if left else 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "List the parts of the launcher's cache with size, last use and the runs that use them; remove those that were not used "
        "lately and that no live or unfinished run of these folders uses."
    )
    parser = VerbParser(prog="python -m launcher clean", description=about)
    kinds = "; ".join(f"{kind}: {description}" for kind, description in KINDS.items())
    parser.add_argument("--only", choices=tuple(KINDS), action="append", help=f"parts of one kind (repeatable): {kinds}")
    older = "parts that were last used longer ago than this, such as 30d, 12h or 2w (default: 7d)"
    parser.add_argument("--older-than", metavar="TIME", type=_seconds, default="7d", help=older)
    shared = "include your own data caches that a group shares; the runs of its other members are not known"
    parser.add_argument("--shared", action="store_true", help=shared)
    add_flags(parser)
    parser.add_argument("--root", action="append", help="folder of runs that may use the cache (repeatable; default: runs)")
    return parser


def _seconds(value: str) -> float:
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", value):
        return float(match[1]) * _SECONDS[match[2]]
    raise argparse.ArgumentTypeError(f"{value} is not a duration: write a number and m, h, d or w, such as 30d")


def list_entries(roots: Iterable[Path], shared: bool = False) -> list[CacheEntry]:
    """List this user's cache entries, ordered by last use, oldest first.

    `roots` are the folders of runs that may use the cache. Data caches that a group shares are kept unless `shared`: the other
    members' runs are unknown.

    Raises:
        SubmitError: if an unfinished run's plan is unreadable, so that it is unknown what the run uses.
    """
    users, entries = list(_users(roots)), list(_entries(shared))
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


def _users(roots: Iterable[Path]) -> Iterator[tuple[str, str, set[str]]]:
    """Yield the directory, the state and the absolute paths in the plans of each run of this user."""
    for run in {run.root.resolve(): run for root in roots for run in run_store.list_runs(root)}.values():
        # Other users' runs use their own caches, or a group's, which are kept.
        if not owners.accepts_owner(run.root.stat().st_uid):
            continue
        state, paths = "unknown", set[str]()
        with suppress(LauncherError):
            state = run_store.read_status(run).state
        for path in (run.plan, *run_store.changed_plan_paths(run)):
            try:
                paths |= set(_paths_of(run_store.read_plan_values(path)))
            except LauncherError:
                if state != "completed":
                    message = "the plan of a run cannot be read, so what it uses is unknown"
                    remedy = f"{plan_remedy(path)}, or remove the run: {launcher_command('rm', run.root)}"
                    raise SubmitError(Problem(message, str(path), remedy=remedy)) from None
        yield str(run.root.absolute()), state, paths


def _paths_of(part: Any) -> Iterator[str]:
    """Yield all absolute paths in a plan: data caches of all splits, model, tokenizer, and whatever plans add."""
    if isinstance(part, dict | list):
        for value in part.values() if isinstance(part, dict) else part:
            yield from _paths_of(value)
    elif isinstance(part, str) and part.startswith("/"):
        yield os.path.realpath(part)


def _entries(shared: bool) -> Iterator[CacheEntry]:
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
            entry = _entry(kind, path, lock)
            if entry is not None and folder in groups and not shared:
                entry.kept = f"shared with the group {folder.name.removeprefix('data-')}"
            yield from filter(None, [entry])
    yield from filter(None, (_entry("checks", root / name, root / f".{name}.lock") for name in _CHECKS))


def _entry(kind: str, path: Path, lock: Path) -> CacheEntry | None:
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
    try:
        file = open(lock, "rb+")  # noqa: SIM115
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _remove(entry: CacheEntry) -> list[str]:
    """Remove an entry; returns what could not be removed, with the reasons."""
    try:
        with open(entry.lock, "rb+") if entry.lock.exists() else nullcontext() as lock:
            if lock is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return remove_path(Path(entry.path))
    except BlockingIOError:
        return [f"{entry.path}: another process began to build it"]
    except OSError as error:
        return [f"{error.filename or entry.path}: {error.strerror or error}"]


def _lines(entries: Sequence[CacheEntry], chosen: Sequence[CacheEntry]) -> list[str]:
    """Return the table of the entries and their total."""
    if not entries:
        return ["the cache is empty"]
    rows = []
    for entry in entries:
        names = [Path(run).name for run in entry.runs]
        more = f" and {len(names) - _RUNS_SHOWN} more" if len(names) > _RUNS_SHOWN else ""
        action = f"keep: {entry.kept}" if entry.kept else "remove" if entry in chosen else "keep"
        age = f"{format_duration(max(0.0, time.time() - entry.used_at))} ago"
        cells = (entry.path, entry.kind, format_size(entry.bytes), age, ", ".join(names[:_RUNS_SHOWN]) + more or "-", action)
        rows.append(cells)
    return [*formatting.table(_COLUMNS, rows), f"in all {format_size(sum(entry.bytes for entry in entries))}"]
