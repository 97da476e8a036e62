"""The verb dashboard: the W&B workspace of a run or a project."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from launcher import run_store
from launcher.errors import ConfigError, RunError, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.security import owners
from launcher.tracking.wandb.workspace import Target, as_json, publish

_PROJECT = re.compile(r"(?:(?P<entity>[\w.-]+)/)?(?P<project>[\w.-]+)")


def publish_workspace(arguments: argparse.Namespace) -> int:
    """Create or update the workspace and print its address, or print what would be sent."""
    name = arguments.target
    try:
        run_dir: RunDir | None = run_store.find_run(name, Path(arguments.root))
    except SubmitError:
        run_dir = None
    if run_dir is not None:
        # It names the project that this user's key writes to.
        owners.require_run(run_dir.root)
        plan = run_store.load_plan(run_dir)
        tracking = plan.config.tracking
        target = Target(tracking.project, tracking.entity, plan.wandb_id, plan.run_name)
    elif (matched := _PROJECT.fullmatch(name)) is not None:
        target = Target(matched["project"], matched["entity"])
    else:
        message, remedy = "this is neither a run nor a W&B project", "write RUN, PROJECT or ENTITY/PROJECT"
        raise ConfigError(message, where="dashboard", value=name, remedy=remedy)
    if arguments.dry_run:
        print(as_json(target))
        return 0
    # Keep W&B's own lines out of the output.
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        address = publish(target)
    except LookupError as error:
        raise ConfigError(
            "no such W&B project, or this login cannot see it",
            where="dashboard",
            value=str(error),
            remedy="a project is created by its first online run; name a run of ./runs, or PROJECT or ENTITY/PROJECT",
        ) from None
    except Exception as error:  # W&B raises far more than wandb.Error.
        if "No API key" in str(error):
            remedy = "log in with `wandb login`, or set WANDB_API_KEY; --dry-run shows the workspace without a login"
            raise ConfigError("there is no login for Weights & Biases", where="dashboard", remedy=remedy) from None
        raise RunError(
            f"Weights & Biases did not accept the workspace: {type(error).__name__}: {error}",
            where="dashboard",
            remedy="check that the server is reachable, and the key (`wandb login`, or WANDB_API_KEY); "
            "--dry-run shows the workspace without it",
        ) from error
    print(f"dashboard: {address}")
    return 0
