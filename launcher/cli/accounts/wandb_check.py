"""Check with W&B before submission, so that a wrong key or entity is found now, not after hours in a queue."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from launcher.config.schema import RunConfig
from launcher.config.sections.cluster import ClusterSection
from launcher.errors import ConfigError

_DEADLINE_S = 30.0


def check(config: RunConfig, environ: dict[str, str]) -> list[str]:
    """Return notes about the login that would track the run; `environ` is the environment of the launcher's processes.

    Raises:
        ConfigError: if W&B rejects the key, the entity or the project, or if mode online has no login.
    """
    account = look_up_account(config, environ)
    return [] if account is None else judge_account(config, account)


def look_up_account(config: RunConfig, environ: dict[str, str]) -> dict[str, Any] | None:
    """Return the `Account` (launcher.tracking.wandb.account) that would track the run, or None if the settings need none."""
    tracking = config.tracking
    if tracking.kind != "wandb" or tracking.mode in ("offline", "disabled"):
        return None
    command = [sys.executable, "-m", "launcher.tracking.wandb.account"]
    try:
        done = subprocess.run(
            command, input=tracking.model_dump_json(), capture_output=True, text=True, env=environ, timeout=_DEADLINE_S
        )
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return {"login": "environment", "entity": None, "refused": "", "unknown": "its package did not answer", "note": ""}


def judge_account(config: RunConfig, account: dict[str, Any]) -> list[str]:
    """Return the notes about an account; raises as `check`."""
    tracking = config.tracking
    if account["login"] is None and tracking.mode == "auto":
        return []
    if not config.cluster.forwards_environment:
        # The login of the cluster's nodes counts; it is unknown here.
        return _login_notes(config.cluster, account["login"])
    if account["refused"]:
        raise ConfigError(
            f"Weights & Biases does not accept this run: {account['refused']}",
            where="tracking",
            value=f"entity={account['entity'] or tracking.entity}, project={tracking.project}, mode={tracking.mode}",
            remedy="log in with: wandb login, set tracking.entity (or WANDB_ENTITY) and tracking.project to a project that you "
            "may write to, or set tracking.mode=offline",
        )
    notes = [f"the launcher could not check whether W&B accepts this run: {account['unknown']}"] if account["unknown"] else []
    notes += [account["note"]] if account["note"] else []
    return [*notes, *_login_notes(config.cluster, account["login"])]


def _login_notes(cluster: ClusterSection, login: str | None) -> list[str]:
    """Return why the ranks may lack this login. Without one they track offline, or fail in mode online."""
    if not cluster.forwards_environment:
        return ["API keys are not sent to this cluster: its nodes need WANDB_API_KEY in their environment"]
    problem = cluster.netrc_problem if login == "netrc" else None
    return [] if problem is None else [f"{problem}: set WANDB_API_KEY in the environment of this command"]
