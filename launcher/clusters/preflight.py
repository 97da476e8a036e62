"""Checks before a run is started, the same on every backend: disk space, the Hub's token, and the mirror."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.checkpoint import store
from launcher.errors import SubmitError
from launcher.export import hub
from launcher.plan import disk
from launcher.plan.run_dir import RunDir

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan


def check_startable(plan: LaunchPlan) -> None:
    """Refuse what would train and could not be saved or pushed, on whatever backend.

    Raises:
        SubmitError: for a disk without room for one checkpoint, a push to the Hub without a token, and a mirror that cannot be
            written.
    """
    repo_id = plan.config.export.push_to_hub
    if repo_id and (problem := hub.token_problem("export.push_to_hub", repo_id)):
        raise SubmitError(problem)
    available = _free_bytes(plan)
    if available is not None and (problem := disk.refusal(plan, available)):
        raise SubmitError(problem)
    if plan.config.checkpoint.mirror is not None:
        from launcher.checkpoint.mirror import upload

        upload.require_usable(plan)


def disk_note(plan: LaunchPlan) -> str | None:
    """Said where the disk of the run directory, as this machine sees it, will not hold all checkpoints that are kept."""
    available = _free_bytes(plan)
    if available is None:
        return None
    return disk.note(plan, available, len(store.list_checkpoints(RunDir(Path(plan.run_dir)).checkpoints)))


def _free_bytes(plan: LaunchPlan) -> int | None:
    """What a user may still write where the run directory is or will be; None where that cannot be told from here."""
    folder = Path(plan.run_dir)
    try:
        while not folder.exists():
            folder = folder.parent
        # Checkpoints may lie on a disk of their own.
        own = RunDir(folder).checkpoints
        return shutil.disk_usage(own if own.exists() else folder).free
    except OSError:
        return None
