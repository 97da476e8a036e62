"""The verb on what a run has saved: checkpoints RUN, with --verify and --prune. Needs no torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.checkpoint import store
from launcher.checkpoint.cleanup import BEING_WRITTEN, Leftover, disk_bytes, find_leftovers, has_unfinished_saves, remove
from launcher.checkpoint.manifest import MANIFEST, Checkpoint
from launcher.checkpoint.retention import Retention, retention_reasons
from launcher.cli import formatting
from launcher.clusters.base import cluster_for
from launcher.errors import EXIT_FAILED, CheckpointError, DamagedCheckpoint, RunError, SubmitError, UnreadableCheckpoint
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.tracking.metrics import format_duration

# What reading a checkpoint from end to end has shown, by its path: None where it is whole.
Known = Mapping[Path, CheckpointError | None]

# A login node is shared, and more readers are not faster on most storage.
_MAX_THREADS = 8
_STATES = {DamagedCheckpoint: "damaged", UnreadableCheckpoint: "cannot be read", CheckpointError: "unreadable"}


@dataclass(frozen=True)
class Row:
    """One checkpoint as it is shown. `state` is one of _STATES, whole or not verified; what cannot be told is None."""

    step: int
    path: str
    bytes: int | None
    saved_at: float | None
    world_size: int | None
    attempt: int | None
    eval_loss: float | None
    kept: tuple[str, ...]
    state: str
    problems: tuple[str, ...] = ()


def run(tokens: list[str]) -> int:
    """List the checkpoints of a run; returns 1 where --verify or --prune has found one damaged, or not readable."""
    arguments = _parser().parse_args(tokens)
    found = run_store.find_run(arguments.run, Path(arguments.root))
    plan = run_store.load_plan(found)
    if not arguments.prune:
        return _show(found, plan, _verified(found) if arguments.verify else {}, [], arguments.json)
    # No attempt may begin meanwhile.
    with run_store.start_lock(found):
        _require_ended(found, plan)
        known = _verified(found) if arguments.verify else _verified_down_to_a_whole_one(found)
        with _in_words(found):
            removed = _prune(found, Retention.of(plan.config.checkpoint), known)
    return _show(found, plan, known, removed, arguments.json)


def _parser() -> argparse.ArgumentParser:
    about = "List the checkpoints of a run: why each is kept, and what unfinished saves and earlier attempts have left behind."
    parser = argparse.ArgumentParser(prog="python -m launcher checkpoints", description=about)
    parser.add_argument("--root", default="runs", help="folder of the runs (default: runs)")
    parser.add_argument("run", metavar="RUN", help="name of the run, or path of its directory")
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its digest")
    prune = "remove what checkpoint.keep_last, keep_every and keep_best do not keep, what is damaged, and all leftovers"
    parser.add_argument("--prune", action="store_true", help=prune)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _require_ended(run: RunDir, plan: LaunchPlan) -> None:
    status = cluster_for(plan.config.cluster.kind).status(run)
    if status.state in RUNNING_STATES:
        raise SubmitError(
            f"the run is {status.state}: it removes by itself what it does not keep",
            where=str(run.root),
            remedy=f"stop it first with: python -m launcher cancel {formatting.short(run.root)}",
        )


def _verified(run: RunDir) -> dict[Path, CheckpointError | None]:
    with _in_words(run):
        known = verify(store.list_checkpoints(run.checkpoints))
        # A run that goes on removes what it does not keep, while it is read as well.
        return {path: error for path, error in known.items() if error is None or path.exists()}


def _verified_down_to_a_whole_one(run: RunDir) -> dict[Path, CheckpointError | None]:
    """Digests of the newest checkpoint, and of those before it while they are damaged: one that is whole is never removed."""
    known: dict[Path, CheckpointError | None] = {}
    with _in_words(run):
        for checkpoint in reversed(store.list_checkpoints(run.checkpoints)):
            known |= verify([checkpoint])
            if not isinstance(known[checkpoint.path], DamagedCheckpoint):
                break
    return known


@contextmanager
def _in_words(run: RunDir) -> Iterator[None]:
    """RunError for what storage refuses."""
    try:
        yield
    except OSError as error:
        raise RunError(
            "the checkpoints of this run cannot be looked at now",
            where=error.filename or str(run.checkpoints),
            value=error.strerror or str(error),
            remedy="try again",
        ) from error


def _writing(run: RunDir, plan: LaunchPlan) -> int | None:
    """The attempt that is just saving, if any; nobody is asked where nothing looks like it."""
    if not has_unfinished_saves(run.checkpoints):
        return None
    running = cluster_for(plan.config.cluster.kind).status(run).state in RUNNING_STATES
    return run_store.newest_attempt(run) if running else None


def _prune(run: RunDir, retention: Retention, known: Known) -> list[Leftover]:
    """Remove what is outdated, what is damaged, and leftovers; returns what is gone.

    Raises:
        SubmitError: where no checkpoint is whole: then what is damaged may be all that there is. And where one cannot be read
            now: it may be the newest, and storage that is down for a moment says nothing about the others either.
    """
    unusable = store.find_unusable(run.checkpoints)
    for error in (*known.values(), *unusable.values()):
        if isinstance(error, UnreadableCheckpoint):
            problem = error.problems[0]
            what = f"{problem.what}, so nothing is removed"
            raise SubmitError(what, where=problem.where, value=problem.value, remedy="try again when it can be read")
    listed = store.list_checkpoints(run.checkpoints)
    whole = [checkpoint for checkpoint in listed if not known.get(checkpoint.path)]
    if not whole:
        raise SubmitError("no checkpoint of this run is whole, so nothing is removed", where=str(run.checkpoints))
    kept = retention_reasons(whole, retention)
    doomed = [
        Leftover(checkpoint.path, "damaged" if known.get(checkpoint.path) else "no longer kept", disk_bytes(checkpoint.path))
        for checkpoint in listed
        if known.get(checkpoint.path) or not kept[checkpoint.step]
    ]
    for step, error in unusable.items():
        path = run.checkpoints / store.step_name(step)
        # What has another format may be whole to another launcher.
        if isinstance(error, DamagedCheckpoint):
            doomed.append(Leftover(path, "damaged", disk_bytes(path)))
    doomed += find_leftovers(run.checkpoints)
    for leftover in doomed:
        remove(leftover.path)
    return doomed


def _rows(run: RunDir, retention: Retention, known: Known) -> list[Row]:
    listed = store.list_checkpoints(run.checkpoints)
    kept = retention_reasons([checkpoint for checkpoint in listed if not known.get(checkpoint.path)], retention)
    rows = [row for c in listed if (row := _row(c, kept.get(c.step, ()), known))]
    for step, error in store.find_unusable(run.checkpoints).items():
        path = run.checkpoints / store.step_name(step)
        num_bytes = None if isinstance(error, UnreadableCheckpoint) else disk_bytes(path)
        rows.append(Row(step, str(path), num_bytes, None, None, None, None, (), _STATES[type(error)], _said(error)))
    return sorted(rows, key=lambda row: row.step)


def _row(checkpoint: Checkpoint, kept: tuple[str, ...], known: Known) -> Row | None:
    """A row of the table; None where the run has removed the checkpoint since it was listed."""
    manifest, error = checkpoint.manifest, known.get(checkpoint.path)
    try:
        saved_at = (checkpoint.path / MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return None
    return Row(
        step=checkpoint.step,
        path=str(checkpoint.path),
        bytes=_num_bytes(checkpoint),
        saved_at=saved_at,
        world_size=manifest.world_size,
        attempt=manifest.attempt,
        eval_loss=manifest.eval_loss,
        kept=kept,
        state=_STATES[type(error)] if error else "whole" if checkpoint.path in known else "not verified",
        problems=_said(error) if error else (),
    )


def _said(error: CheckpointError) -> tuple[str, ...]:
    return tuple(store.format_problems([problem]) for problem in error.problems)


def _show(run: RunDir, plan: LaunchPlan, known: Known, removed: Sequence[Leftover], as_json: bool) -> int:
    """Print the table, or JSON; what --prune has removed was damaged all the same."""
    with _in_words(run):
        rows = _rows(run, Retention.of(plan.config.checkpoint), known)
        left = find_leftovers(run.checkpoints, _writing(run, plan))
    damaged = any(known.values()) or (bool(known) and any(row.state in ("damaged", "cannot be read") for row in rows))
    freed = sum(leftover.bytes for leftover in removed)
    if as_json:
        shown: dict[str, Any] = {
            "run": run.root.name,
            "dir": str(run.checkpoints),
            "checkpoints": [vars(row) for row in rows],
            "leftovers": [leftover.as_json() for leftover in left],
            "removed": [leftover.as_json() for leftover in removed],
            "freed_bytes": freed,
        }
        print(json.dumps(shown, indent=2))
        return EXIT_FAILED if damaged else 0
    for leftover in removed:
        print(f"removed  {leftover.path.name}: {leftover.what}, {formatting.size(leftover.bytes)}")
    if removed:
        print(f"freed    {formatting.size(freed)} ({freed:,} bytes)\n")
    print("\n".join(_table(rows)) if rows else f"no checkpoints in {formatting.short(run.checkpoints)}")
    begun, ended = ([item for item in left if (item.what == BEING_WRITTEN) is wanted] for wanted in (True, False))
    for items, title in ((begun, "a save in progress:"), (ended, "leftovers, which --prune removes:")):
        if items:
            print(f"\n{title}")
            print("\n".join(f"  {item.path.name}: {item.what}, {formatting.size(item.bytes)}" for item in items))
    return EXIT_FAILED if damaged else 0


def _table(rows: Sequence[Row]) -> list[str]:
    num_newest = sum("newest" in row.kept for row in rows)
    words = {"newest": f"among the newest {num_newest}"} if num_newest > 1 else {}
    table = [(("step", "size", "age", "ranks", "attempt", "held out"), ("kept as", "state"))]
    for row in rows:
        age = "-" if row.saved_at is None else format_duration(max(0.0, time.time() - row.saved_at))
        loss = "-" if row.eval_loss is None else f"{row.eval_loss:.4f}"
        size = "-" if row.bytes is None else formatting.size(row.bytes)
        numbers = (str(row.step), size, age, _or_dash(row.world_size), _or_dash(row.attempt), loss)
        state = f"{row.state}: {'; '.join(row.problems)}" if row.problems else row.state
        kept = "-" if row.problems else ", ".join(words.get(why, why) for why in row.kept) or "would be pruned"
        table.append((numbers, (kept, state)))
    widths = [max(len(numbers[i]) for numbers, _ in table) for i in range(6)]
    kept_width = max(len(words[0]) for _, words in table)
    return [
        "  ".join([*(f"{n:>{w}}" for n, w in zip(numbers, widths, strict=True)), f"{kept:<{kept_width}}", state])
        for numbers, (kept, state) in table
    ]


def verify(checkpoints: Sequence[Checkpoint]) -> dict[Path, CheckpointError | None]:
    """Read checkpoints from end to end and compare them with their digests; shows progress on a terminal.

    Returns, by the path of each checkpoint, DamagedCheckpoint, UnreadableCheckpoint, or None for an intact one.
    """
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with _progress(sum(_num_bytes(checkpoint) for checkpoint in checkpoints)) as on_read:
        return {checkpoint.path: _verify_one(checkpoint, num_threads, on_read) for checkpoint in checkpoints}


def _num_bytes(checkpoint: Checkpoint) -> int:
    """Sum the sizes of the files that the manifest names."""
    return sum(entry.size for entry in checkpoint.manifest.files.values())


def _verify_one(checkpoint: Checkpoint, num_threads: int, on_read: Callable[[int], None] | None) -> CheckpointError | None:
    try:
        problems = store.verify(checkpoint.path, threads=num_threads, on_read=on_read)
    except UnreadableCheckpoint as error:
        return error
    return DamagedCheckpoint(problems) if problems else None


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=num_bytes)
        yield lambda count: progress.advance(task, count)


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)
