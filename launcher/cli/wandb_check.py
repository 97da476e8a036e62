"""W&B's word on a run before anything is submitted: a wrong key or entity is found out here, not after hours in a queue."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from launcher.config.cluster import ClusterSection
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError

_DEADLINE_S = 30.0


def check(config: RunConfig, environ: dict[str, str]) -> list[str]:
    """What a person should know of the login that the run would be tracked with; `environ` is that of this package's processes.

    Raises:
        ConfigError: where W&B refuses the key, the entity or the project, or online is asked for without a login.
    """
    tracking = config.tracking
    if tracking.kind != "wandb" or tracking.mode in ("offline", "disabled"):
        return []
    account = _look_up(tracking.model_dump_json(), environ)
    if account["login"] is None and tracking.mode == "auto":
        return []
    if not config.cluster.forwards_environment:
        # The login of the cluster's nodes counts, which is not known here.
        return _not_travelling(config.cluster, account["login"])
    if account["refused"]:
        raise ConfigError(
            f"Weights & Biases will not take this run: {account['refused']}",
            where="tracking",
            value=f"entity={account['entity'] or tracking.entity}, project={tracking.project}, mode={tracking.mode}",
            remedy="log in with: wandb login, set tracking.entity (or WANDB_ENTITY) and tracking.project to what you may write "
            "to, or set tracking.mode=offline",
        )
    said = [f"whether W&B takes this run is not known: {account['unknown']}"] if account["unknown"] else []
    said += [account["note"]] if account["note"] else []
    return [*said, *_not_travelling(config.cluster, account["login"])]


def _look_up(tracking: str, environ: dict[str, str]) -> dict[str, Any]:
    unknown: dict[str, Any] = {
        "login": "environment",
        "entity": None,
        "refused": "",
        "unknown": "its package did not answer",
        "note": "",
    }
    command = [sys.executable, "-m", "launcher.tracking.wandb.account"]
    try:
        done = subprocess.run(command, input=tracking, capture_output=True, text=True, env=environ, timeout=_DEADLINE_S)
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return unknown


def _not_travelling(cluster: ClusterSection, login: str | None) -> list[str]:
    """Why the ranks may not have the login that is here: without one they go on offline, or fail where online is asked for."""
    if not cluster.forwards_environment:
        return ["API keys are not sent to this cluster: its nodes need WANDB_API_KEY in their environment"]
    problem = cluster.netrc_problem if login == "netrc" else None
    return [] if problem is None else [f"{problem}: set WANDB_API_KEY in the environment of this command"]
