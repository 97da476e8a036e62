"""Checks before a run starts, identical on every backend: disk space, the repository on the Hub, and the mirror."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.checkpoint import store
from launcher.errors import Problem, SubmitError
from launcher.export import hub
from launcher.plan.checkpoints import describe_low_room, find_room_problem
from launcher.plan.run_dir import RunDir

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan


def check_startable(plan: LaunchPlan) -> None:
    """Reject a run that could train but could not save or upload its result: run directory, disk, Hub and mirror."""
    if problem := folder_problem(Path(plan.run_dir)):
        raise SubmitError(problem)
    repo_id = plan.config.export.push_to_hub
    if repo_id and (problem := hub.token_problem("export.push_to_hub", repo_id)):
        raise SubmitError(problem)
    if repo_id and hub.is_public(repo_id):
        raise SubmitError(hub.public_problem("export.push_to_hub", repo_id, RunDir(Path(plan.run_dir)).export))
    num_free_bytes = _free_bytes(plan)
    if num_free_bytes is not None and (problem := find_room_problem(plan, num_free_bytes)):
        raise SubmitError(problem)
    if plan.config.checkpoint.mirror is not None:
        from launcher.checkpoint.mirror import require_usable_mirror

        require_usable_mirror(plan)


def folder_problem(run_dir: Path) -> Problem | None:
    """Return why a run's directory cannot be created, or None if it can or exists."""
    above = next(path for path in (run_dir, *run_dir.parents) if os.path.lexists(path))
    if not above.is_dir():
        reason = "is not a folder"
    elif above != run_dir and not os.access(above, os.W_OK | os.X_OK):
        reason = "cannot be written"
    else:
        return None
    return Problem(
        f"the run directory cannot be created: {above} {reason}", "run.root", str(run_dir.parent), "choose another run.root"
    )


def push_note(plan: LaunchPlan) -> str | None:
    """Return a note if the Hub could not be asked whether the run's repository is public; None if it was, or need not be."""
    repo_id = plan.config.export.push_to_hub
    if repo_id is None or hub.is_public(repo_id) is not None:
        return None
    return f"the Hub did not say whether {repo_id} is public; if it is, nothing is pushed at the end"


def disk_note(plan: LaunchPlan) -> str | None:
    """Return a warning if the run directory's disk is too small for all retained checkpoints, or None."""
    num_free_bytes = _free_bytes(plan)
    if num_free_bytes is None:
        return None
    return describe_low_room(plan, num_free_bytes, len(store.list_checkpoints(RunDir(Path(plan.run_dir)).checkpoints)))


def _free_bytes(plan: LaunchPlan) -> int | None:
    """Return the free bytes where the run directory is or will be, or None if this machine cannot read them."""
    try:
        folder = existing_folder(Path(plan.run_dir))
        # The checkpoints folder may be on another disk.
        checkpoints = RunDir(folder).checkpoints
        return shutil.disk_usage(checkpoints if checkpoints.exists() else folder).free
    except OSError:
        return None


def existing_folder(path: Path) -> Path:
    """Return the path itself or its closest existing parent folder."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
