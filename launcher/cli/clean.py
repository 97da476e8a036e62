"""The verb `clean`: list the content of the launcher's cache, and remove what no unfinished run uses."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from launcher import locks
from launcher.cli import formatting
from launcher.cli.arguments import VerbParser
from launcher.cli.cleanup import run_folders
from launcher.cli.cleanup.cache_entries import KINDS, CacheEntry, is_locked, list_entries
from launcher.cli.cleanup.removal import add_flags, is_confirmed, remove_path
from launcher.errors import EXIT_FAILED, EXIT_REFUSED, printable
from launcher.plan.quantities import format_count, format_size
from launcher.security.redaction import redacted_command_line
from launcher.tracking.metrics import format_duration

_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
_BYTES_IN_LOWER_CASE = {unit.lower(): num_bytes for unit, num_bytes in _BYTES.items()}
# In a narrow terminal, the first column gets its own line above the others.
_COLUMNS = ("path", "kind", ">size", ">last use", "runs", "action")
_RUNS_SHOWN = 3


def run(verb: str, tokens: list[str]) -> int:
    """Remove parts of the cache; returns 1 if files could not be removed."""
    arguments = _parser().parse_args(tokens)
    roots = [Path(root).expanduser() for root in arguments.root or ["runs"]]
    entries = list_entries([*roots, *run_folders.recall()], arguments.shared)
    entries = [entry for entry in entries if not arguments.only or entry.kind in arguments.only]
    chosen = _choose(entries, arguments)
    total = format_size(sum(entry.bytes for entry in chosen))
    if not arguments.json:
        print("\n".join(_lines(entries, chosen)), end="\n\n" if entries else "\n")
    question = f"remove {len(chosen)} of {format_count(len(entries), 'part')}, {total}?"
    if chosen and not is_confirmed(arguments, question, (verb, *tokens)):
        return EXIT_REFUSED
    removed, left = ([], []) if arguments.dry_run else _remove(chosen)
    freed = sum(entry.bytes for entry in removed)
    if arguments.json:
        values = {
            "entries": [entry.as_json() for entry in entries],
            "chosen": [str(entry.path) for entry in chosen],
            "removed": [str(entry.path) for entry in removed],
            "freed_bytes": freed,
            "left": left,
        }
        print(formatting.as_json(values))
    elif not chosen:
        print("nothing to remove")
    elif arguments.dry_run:
        print(f"{format_count(len(chosen), 'part')}, {total}: nothing was removed, because of --dry-run")
    else:
        print(f"removed {format_count(len(removed), 'part')}, {format_size(freed)}")
    rest = sum(entry.bytes for entry in entries) - sum(entry.bytes for entry in chosen)
    if arguments.max_size is not None and rest > arguments.max_size:
        print(f"note: {format_size(rest)} remain, more than --max-size: the rest is in use or not chosen", file=sys.stderr)
    for line in left:
        print(printable(f"not removed: {line}"), file=sys.stderr)
    return EXIT_FAILED if left else 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "List the parts of the launcher's cache with size, last use and the runs that use them; remove those that no live or "
        "unfinished run uses."
    )
    parser = VerbParser(prog="python -m launcher clean", description=about)
    kinds = "; ".join(f"{kind}: {description}" for kind, description in KINDS.items())
    parser.add_argument("--only", choices=tuple(KINDS), action="append", help=f"parts of one kind (repeatable): {kinds}")
    older = "parts that were last used longer ago than this, such as 30d, 12h or 2w"
    parser.add_argument("--older-than", metavar="TIME", type=_seconds, help=older)
    parser.add_argument("--larger-than", metavar="SIZE", type=_num_bytes, help="parts larger than this, such as 10GiB")
    size = "remove the least recently used parts until the cache has this size, such as 200GiB"
    parser.add_argument("--max-size", metavar="SIZE", type=_num_bytes, help=size)
    shared = "include your own data caches that a group shares; the runs of its other members are not known"
    parser.add_argument("--shared", action="store_true", help=shared)
    add_flags(parser)
    root = "folder of runs that may use the cache (repeatable; default: runs); folders in which runs were started are known"
    parser.add_argument("--root", action="append", help=root)
    return parser


def _seconds(value: str) -> float:
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", value):
        return float(match[1]) * _SECONDS[match[2]]
    raise argparse.ArgumentTypeError(f"{value} is not a duration: write a number and m, h, d or w, such as 30d")


def _num_bytes(value: str) -> float:
    if match := re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_BYTES_IN_LOWER_CASE)})", value.lower()):
        return float(match[1]) * _BYTES_IN_LOWER_CASE[match[2]]
    raise argparse.ArgumentTypeError(f"{value} is not a size: write a number and {', '.join(_BYTES)}, such as 200GiB")


def _choose(entries: Sequence[CacheEntry], arguments: argparse.Namespace) -> list[CacheEntry]:
    """Return the entries to remove; `entries` are ordered by last use, oldest first."""
    now, chosen = time.time(), []
    size = sum(entry.bytes for entry in entries)
    for entry in entries:
        if entry.kept or (arguments.older_than is not None and now - entry.used_at <= arguments.older_than):
            continue
        if arguments.larger_than is not None and entry.bytes <= arguments.larger_than:
            continue
        if arguments.max_size is not None and size <= arguments.max_size:
            break
        chosen.append(entry)
        size -= entry.bytes
    return chosen


def _remove(chosen: Sequence[CacheEntry]) -> tuple[list[CacheEntry], list[str]]:
    """Remove entries under their locks; returns the removed entries, and what could not be removed with the reasons."""
    removed, left = [], []
    for entry in chosen:
        with ExitStack() as stack:
            try:
                # A lock inside the folder is removed with it; it was never held for long.
                if entry.lock is not None and entry.path not in entry.lock.parents:
                    stack.enter_context(locks.hold(entry.lock, 0, redacted_command_line(), mode=0o600))
                elif entry.lock is not None and is_locked(entry.lock):
                    raise locks.LockTimeout
                if entry.is_replaced:
                    failures = [f"{entry.path}: it was replaced by something else after it was listed"]
                else:
                    failures = [line for path in reversed(entry.paths) for line in remove_path(path)]
            except locks.LockTimeout:
                failures = [f"{entry.path}: another process began to build it"]
            except OSError as error:
                failures = [f"{error.filename or entry.path}: {error.strerror or error}"]
        left += failures
        if not failures:
            removed.append(entry)
    return removed, left


def _lines(entries: Sequence[CacheEntry], chosen: Sequence[CacheEntry]) -> list[str]:
    """Return the table of the entries and their total."""
    if not entries:
        return ["the cache is empty"]
    now = time.time()
    rows = []
    for entry in entries:
        names = [Path(run).name for run in entry.runs]
        more = f" and {len(names) - _RUNS_SHOWN} more" if len(names) > _RUNS_SHOWN else ""
        action = f"keep: {entry.kept}" if entry.kept else "remove" if entry in chosen else "keep"
        age = f"{format_duration(max(0.0, now - entry.used_at))} ago"
        cells = (str(entry.path), entry.kind, format_size(entry.bytes), age, ", ".join(names[:_RUNS_SHOWN]) + more or "-", action)
        rows.append(tuple(map(printable, cells)))
    return [*formatting.table(_COLUMNS, rows), f"in all {format_size(sum(entry.bytes for entry in entries))}"]
