"""The verb `checkpoints`: list a run's checkpoints, verify them against their digests, prune them. Does not need torch."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint import store
from launcher.checkpoint.manifest import HELD_OUT, MANIFEST, Checkpoint, describe_loss
from launcher.checkpoint.store import (
    BEING_WRITTEN,
    Leftover,
    Retention,
    disk_bytes,
    find_leftovers,
    has_unfinished_saves,
    remove,
    retention_of,
    retention_reasons,
)
from launcher.cli.render import terminal
from launcher.cli.render.sections import Items, Rows, Section, Table, Text
from launcher.cli.status import require_ended
from launcher.clusters.backends import cluster_for, status_reader_for
from launcher.errors import EXIT_FAILED, CheckpointError, DamagedCheckpoint, SubmitError, UnreadableCheckpoint
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_size
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import RUNNING_STATES
from launcher.security import folders
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking.metrics import format_age
from launcher.tracking.progress import show_progress

# Verification results, keyed by path: None for an intact checkpoint.
Verified = Mapping[Path, CheckpointError | None]

# A login node is shared, and on most storage more readers are not faster.
_MAX_THREADS = 8
_STATES = {DamagedCheckpoint: "damaged", UnreadableCheckpoint: "cannot be read", CheckpointError: "unreadable"}


@dataclass(frozen=True)
class CheckpointRow:
    """A row of the table. `state` is one of _STATES, "intact" or "not verified"; unknown values are None."""

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
    eval_set: str = HELD_OUT


def show_checkpoints(arguments: argparse.Namespace) -> int:
    """List the checkpoints of a run; returns 1 if --verify or --prune found a damaged or unreadable one."""
    run_dir = run_store.find_run(arguments.run, arguments.root)
    plan = run_store.load_plan(run_dir)
    if not arguments.prune:
        return _show(run_dir, plan, _verify_all(run_dir) if arguments.verify else {}, [], arguments.json)
    # While this holds the lock, no other command starts an attempt.
    folders.require_run(run_dir.root)
    with run_store.start_lock(run_dir):
        status = cluster_for(plan.config.cluster.kind).status(run_dir)
        if status.state in RUNNING_STATES:
            raise SubmitError(
                f"the run is {status.state} and prunes its checkpoints itself",
                where=str(run_dir.root),
                remedy=f"to prune them now, stop it with: {launcher_command('cancel', short_path(run_dir.root))}",
            )
        require_ended(run_dir)
        verified = _verify_all(run_dir) if arguments.verify else _verify_until_intact(run_dir)
        removed = _prune(run_dir, retention_of(run_dir, plan), verified)
    return _show(run_dir, plan, verified, removed, arguments.json)


def _verify_all(run: RunDir) -> dict[Path, CheckpointError | None]:
    verified = verify(store.list_checkpoints(run.checkpoints))
    # An active run may remove a checkpoint while it is being read.
    return {path: error for path, error in verified.items() if error is None or path.exists()}


def _verify_until_intact(run: RunDir) -> dict[Path, CheckpointError | None]:
    """Verify from the newest checkpoint back to the first intact one, which must not be removed."""
    verified: dict[Path, CheckpointError | None] = {}
    for checkpoint in reversed(store.list_checkpoints(run.checkpoints)):
        verified |= verify([checkpoint])
        if not isinstance(verified[checkpoint.path], DamagedCheckpoint):
            break
    return verified


def _prune(run: RunDir, retention: Retention, verified: Verified) -> list[Leftover]:
    """Remove outdated and damaged checkpoints, and leftovers; returns what was removed."""
    unusable = store.find_unusable(run.checkpoints)
    for error in (*verified.values(), *unusable.values()):
        if isinstance(error, UnreadableCheckpoint):
            problem = error.problems[0]
            # It may be the newest.
            raise SubmitError(
                f"{problem.message}, so nothing is removed",
                where=problem.where,
                value=problem.value,
                remedy="try again when it can be read",
            )
    listed = store.list_checkpoints(run.checkpoints)
    intact = [checkpoint for checkpoint in listed if not verified.get(checkpoint.path)]
    if not intact:
        # A damaged one may be all that is left of the run.
        raise SubmitError("no checkpoint of this run is intact, so nothing is removed", where=str(run.checkpoints))
    keep_reasons = retention_reasons(intact, retention)
    to_remove = [
        Leftover(checkpoint.path, "damaged" if verified.get(checkpoint.path) else "no longer kept", disk_bytes(checkpoint.path))
        for checkpoint in listed
        if verified.get(checkpoint.path) or not keep_reasons[checkpoint.step]
    ]
    for step, error in unusable.items():
        path = run.checkpoints / store.step_name(step)
        # Another launcher may be able to use a checkpoint in another format.
        if isinstance(error, DamagedCheckpoint):
            to_remove.append(Leftover(path, "damaged", disk_bytes(path)))
    to_remove += find_leftovers(run.checkpoints)
    for leftover in to_remove:
        remove(leftover.path)
    return to_remove


def _list_rows(run: RunDir, retention: Retention, verified: Verified) -> list[CheckpointRow]:
    listed, rows = store.list_checkpoints(run.checkpoints), []
    keep_reasons = retention_reasons([checkpoint for checkpoint in listed if not verified.get(checkpoint.path)], retention)
    for checkpoint in listed:
        manifest, error = checkpoint.manifest, verified.get(checkpoint.path)
        # The run may have removed the checkpoint since it was listed.
        with suppress(FileNotFoundError):
            row = CheckpointRow(
                step=checkpoint.step,
                path=str(checkpoint.path),
                bytes=_num_bytes(checkpoint),
                saved_at=(checkpoint.path / MANIFEST).stat().st_mtime,
                world_size=manifest.world_size,
                attempt=manifest.attempt,
                eval_loss=checkpoint.eval_loss,
                kept=keep_reasons.get(checkpoint.step, ()),
                state=_STATES[type(error)] if error else "intact" if checkpoint.path in verified else "not verified",
                problems=_describe(error) if error else (),
                eval_set=checkpoint.eval_set,
            )
            rows.append(row)
    for step, error in store.find_unusable(run.checkpoints).items():
        path = run.checkpoints / store.step_name(step)
        num_bytes = None if isinstance(error, UnreadableCheckpoint) else disk_bytes(path)
        rows.append(CheckpointRow(step, str(path), num_bytes, None, None, None, None, (), _STATES[type(error)], _describe(error)))
    return sorted(rows, key=lambda row: row.step)


def _describe(error: CheckpointError) -> tuple[str, ...]:
    return tuple(store.format_problems([problem]) for problem in error.problems)


def _show(run: RunDir, plan: LaunchPlan, verified: Verified, removed: Sequence[Leftover], as_json: bool) -> int:
    """Print the table, or JSON; returns 1 if a checkpoint is or was damaged, even if --prune has removed it."""
    rows = _list_rows(run, retention_of(run, plan), verified)
    saving_attempt = None
    # The backend is asked only if there is an unfinished save.
    if has_unfinished_saves(run.checkpoints):
        is_running = status_reader_for(run, plan.config.cluster.kind).status(run).state in RUNNING_STATES
        saving_attempt = run_store.newest_attempt(run) if is_running else None
    left = find_leftovers(run.checkpoints, saving_attempt)
    has_damage = any(verified.values()) or (bool(verified) and any(row.state in ("damaged", "cannot be read") for row in rows))
    num_freed_bytes = sum(leftover.bytes for leftover in removed)
    if as_json:
        values: dict[str, Any] = {
            "run": run.root.name,
            "dir": str(run.checkpoints),
            "checkpoints": [vars(row) for row in rows],
            "leftovers": [leftover.as_json() for leftover in left],
            "removed": [leftover.as_json() for leftover in removed],
            "freed_bytes": num_freed_bytes,
        }
        print(json.dumps(values, indent=2))
        return EXIT_FAILED if has_damage else 0
    texts = {item.path: f"{item.path.name}: {item.what}, {format_size(item.bytes)}" for item in (*removed, *left)}
    sections = []
    if removed:
        freed = ("freed", f"{format_size(num_freed_bytes)} ({num_freed_bytes:,} bytes)")
        sections.append(Section("", [Rows([*(("removed", texts[item.path]) for item in removed), freed])]))
    shown = _build_table(rows) if rows else Text(f"no checkpoints in {short_path(run.checkpoints)}")
    sections.append(Section("", [shown]))
    for title, is_progress in (("a save in progress:", True), ("leftovers, which --prune removes:", False)):
        if items := [texts[item.path] for item in left if (item.what == BEING_WRITTEN) == is_progress]:
            sections.append(Section(title, [Items(items)]))
    terminal.show(*sections, label_columns=9)
    return EXIT_FAILED if has_damage else 0


def _build_table(rows: Sequence[CheckpointRow]) -> Table:
    num_newest = sum("newest" in row.kept for row in rows)
    labels = {"newest": f"among the newest {num_newest}"} if num_newest > 1 else {}
    cells = []
    for row in rows:
        age = "-" if row.saved_at is None else format_age(row.saved_at)
        loss = describe_loss(row.eval_loss, row.eval_set)
        size = "-" if row.bytes is None else format_size(row.bytes)
        written = ("-" if number is None else str(number) for number in (row.world_size, row.attempt))
        state = f"{row.state}: {'; '.join(row.problems)}" if row.problems else row.state
        kept = "-" if row.problems else ", ".join(labels.get(reason, reason) for reason in row.kept) or "would be pruned"
        cells.append((str(row.step), size, age, *written, loss, kept, state))
    return Table(("step", "size", "age", "ranks", "attempt", "eval loss", "kept as", "state"), cells, numbers=range(6))


def verify(checkpoints: Sequence[Checkpoint]) -> dict[Path, CheckpointError | None]:
    """Read checkpoints from end to end and compare them with their digests; returns None for the path of an intact one."""
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    verified: dict[Path, CheckpointError | None] = {}
    with show_progress() as make_progress:
        on_read = make_progress("verifying", sum(_num_bytes(checkpoint) for checkpoint in checkpoints))
        for checkpoint in checkpoints:
            try:
                problems = store.verify(checkpoint.path, threads=num_threads, on_read=on_read)
                verified[checkpoint.path] = DamagedCheckpoint(problems) if problems else None
            except UnreadableCheckpoint as error:
                verified[checkpoint.path] = error
    return verified


def _num_bytes(checkpoint: Checkpoint) -> int:
    """Sum the sizes of the files that the manifest names."""
    return sum(entry.size for entry in checkpoint.manifest.files.values())
