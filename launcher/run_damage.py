"""Errors and remedies for a run whose files are missing or damaged, with the commands to copy."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from launcher import json_records
from launcher.errors import DamagedRun
from launcher.plan.run_dir import RunDir
from launcher.shell_commands import launcher_command, shell_command


def record_remedy(run: RunDir) -> str:
    """Return how to continue without a record such as status.json."""
    weights = launcher_command(f"model.path=run:{run.root}")
    return f"restore the file from a backup, or start another run from this run's newest checkpoint: {weights} ..."


def plan_remedy(path: Path) -> str:
    """Return how to restore a plan: plans/ keeps a copy of each, under its digest."""
    from launcher.plan.launch_plan import digest_of

    run = RunDir(path.parent if path.parent.parent.name != "attempts" else path.parents[2])
    copies = []
    with suppress(OSError):
        copies = sorted(run.plans.glob("*.json"), key=lambda copy: copy.stat().st_mtime)
    # The run's own plan was stored first; an attempt's plan may be any of the others.
    for copy in copies if path == run.plan else reversed(copies):
        with suppress(OSError, ValueError):
            if digest_of(json_records.read_bytes(copy).decode()) == copy.stem:
                return f"restore it with: {shell_command('cp', copy, path)}"
    return "restore the file from a backup"


def unreadable_plan(path: Path, value: str) -> DamagedRun:
    """Return the error of a plan that is damaged or of an unknown schema; `value` is the reason."""
    message = "the plan of this run cannot be read by this launcher"
    return DamagedRun(message, where=str(path), value=value, remedy=plan_remedy(path))


def looks_like_run(folder: Path) -> bool:
    """Return whether a folder holds files of a run."""
    return any((folder / name).exists() for name in ("plan.json", "status.json", "plans", "checkpoints", "attempts"))
