"""The verb `export`: write a run's checkpoint as a Hugging Face folder, in a process that may import torch."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint import store
from launcher.cli.worker_process import run_worker
from launcher.clusters.preflight import existing_folder
from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.errors import CheckpointError, RunError, SubmitError
from launcher.export import hub
from launcher.plan.quantities import format_size
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.runs.run_records import EXPORT_RECORD, ExportRecord
from launcher.security import folders
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking.metrics import format_age

_BYTES_OF_DTYPE = {"bf16": 2, "fp16": 2, "fp32": 4}


def export_run(arguments: argparse.Namespace) -> int:
    """Export a checkpoint; returns the exit code of the process that writes it."""
    run_dir = run_store.find_own_run(arguments.run, arguments.root)
    plan = run_store.load_plan(run_dir)
    if (repo_id := arguments.push) is not None:
        # A push that cannot succeed is refused before the export.
        if not HUB_ID_PATTERN.fullmatch(repo_id):
            message = "this is not the name of a Hub repository"
            raise SubmitError(message, where="--push", value=repo_id, remedy="write owner/name")
        if problem := hub.token_problem("--push", repo_id):
            raise SubmitError(problem)
        if hub.is_public(repo_id):
            raise SubmitError(hub.public_problem("--push", repo_id, run_dir.export))
    step = require_checkpoint(run_dir, arguments.step)
    out = run_dir.export if arguments.out is None else arguments.out.expanduser().absolute()
    _require_writable(out)
    if arguments.out is not None:
        folders.require_own_folder(f"an export to {out}", out, "choose an --out that only you can replace")
    existing = None
    # A damaged record counts as none.
    with suppress(RunError):
        existing = json_records.read_if_present(ExportRecord, out / EXPORT_RECORD, "")
    trained = plan.config.model.dtype if plan.config.model.dtype in _BYTES_OF_DTYPE else "bf16"
    dtype = arguments.dtype or (existing.dtype if existing is not None else trained)
    if existing is not None:
        _require_replaceable(run_dir, out, existing, step, dtype, arguments.replace)
    # An export that is replaced stays until the new one is complete.
    needed, free = plan.model.num_params * _BYTES_OF_DTYPE[dtype], shutil.disk_usage(existing_folder(out)).free
    if free < needed:
        raise SubmitError(
            "the disk of the export folder has no room for its weights",
            where=str(out),
            value=f"needed {format_size(needed)}, available {format_size(free)}",
            remedy="free space there, or name a folder on another disk with --out",
        )
    command = [sys.executable, "-m", "launcher.worker.export", str(run_dir.plan), "--step", str(step), "--dtype", dtype]
    command += ["--out", str(out)] if arguments.out is not None else []
    command += ["--push", repo_id] if repo_id is not None else []
    command += ["--no-check"] if arguments.no_check else []
    code, _ = run_worker(command)
    return code


def require_checkpoint(run: RunDir, step: int | None) -> int:
    """Return the step of the checkpoint to export; rejects a step without a checkpoint, and a run without checkpoints."""
    try:
        return (store.get_latest(run.checkpoints) if step is None else store.get_at_step(run.checkpoints, step)).step
    except CheckpointError as error:
        save = f"continue the run until it saves one: {launcher_command('resume', short_path(run.root))}"
        raise SubmitError(replace(problem, remedy=problem.remedy or save) for problem in error.problems) from None


def _require_writable(out: Path) -> None:
    """Reject a folder that is not writable, or that contains anything other than an export."""
    existing = next(path for path in (out, *out.parents) if path.exists())
    # The folder is written beside its final name.
    beside = existing if existing != out else out.parent
    if not existing.is_dir() or not os.access(beside, os.W_OK | os.X_OK):
        raise SubmitError(
            "the export folder cannot be written",
            where=str(out),
            value=f"{beside} cannot be written by this user" if existing.is_dir() else f"{existing} is a file",
            remedy="name another folder with --out",
        )
    if existing == out and not (out / EXPORT_RECORD).exists() and any(out.iterdir()):
        raise SubmitError(
            "the export folder holds files that are not an export", where=str(out), remedy="name another folder with --out"
        )


def _require_replaceable(run: RunDir, out: Path, existing: ExportRecord, step: int, dtype: str, replace: bool) -> None:
    """Print what an export folder holds before replacing it; without `replace`, reject a different type or a later step.

    A newer step in the same type needs no `replace`: the run was trained further.
    """
    age = format_age((out / EXPORT_RECORD).stat().st_mtime)
    held = f"step {existing.step} in {existing.dtype}, written {age} ago"
    if not replace and (existing.dtype != dtype or existing.step > step):
        words = ("export", short_path(run.root), "--step", str(step), "--dtype", dtype)
        beside = short_path(out.with_name(f"{out.name}-step{step}-{dtype}"))
        raise SubmitError(
            f"the export folder holds another export: {held}",
            where=short_path(out),
            value=f"asked for: step {step} in {dtype}",
            remedy=f"write beside it with: {launcher_command(*words, '--out', beside)}, or replace it with --replace",
        )
    if (existing.step, existing.dtype) != (step, dtype):
        print(f"replacing the export of {held}", flush=True)
