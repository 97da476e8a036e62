"""This shell's logins at Weights & Biases and the Hub: whether they exist and, if the service answers, are valid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.cli.worker_process import worker_environment
from launcher.clusters.check_results import FAILURE, OK, WARNING, CheckResult, from_problem
from launcher.config.schema import RunConfig
from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError, Problem
from launcher.export.hub import TOKEN_VARIABLE, token_problem
from launcher.models.found_model import locate
from launcher.security.connections import request_json

# Repositories, by the start of their name, whose license must be accepted before a download.
GATED = ("google/gemma-", "meta-llama/")
_WANDB_DEADLINE_S = 30.0
_HUB_DEADLINE_S = 10.0
_MAX_NAME_CHARS = 100
_WANDB, _HUB = "W&B", "Hub"
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"  # noqa: S105


def check_wandb(config: RunConfig, environ: dict[str, str]) -> list[str]:
    """Check with W&B before submission, so that a wrong key or entity is found now, not after hours in a queue.

    Returns notes about the login that would track the run; `environ` is the environment of the launcher's processes.

    Raises:
        ConfigError: if W&B rejects the key, the entity or the project, or if mode online has no login.
    """
    account = _look_up_wandb_account(config, environ)
    return [] if account is None else _judge_wandb_account(config, account)


def _look_up_wandb_account(config: RunConfig, environ: dict[str, str]) -> dict[str, Any] | None:
    """Return the `Account` (launcher.tracking.wandb.project) that would track the run, or None if the settings need none."""
    tracking = config.tracking
    if tracking.kind != "wandb" or tracking.mode in ("offline", "disabled"):
        return None
    command = [sys.executable, "-m", "launcher.tracking.wandb.project"]
    try:
        done = subprocess.run(
            command, input=tracking.model_dump_json(), capture_output=True, text=True, env=environ, timeout=_WANDB_DEADLINE_S
        )
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return {"login": "environment", "entity": None, "refused": "", "unknown": "its package did not answer", "note": ""}


def _judge_wandb_account(config: RunConfig, account: dict[str, Any]) -> list[str]:
    """Return the notes about an account; raises as `check_wandb`."""
    tracking = config.tracking
    if account["login"] is None and tracking.mode == "auto":
        return []
    if not config.cluster.forwards_environment:
        # The login of the cluster's nodes counts; it is unknown here. Without one, they track offline, or fail in mode online.
        return ["API keys are not sent to this cluster: its nodes need WANDB_API_KEY in their environment"]
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
    if account["login"] == "netrc" and (problem := config.cluster.netrc_problem) is not None:
        notes.append(f"{problem}: set WANDB_API_KEY in the environment of this command")
    return notes


def find_hub_token() -> tuple[str | None, str]:
    """Return the token that huggingface_hub uses, and where it comes from."""
    if token := os.environ.get(TOKEN_VARIABLE):
        return token.strip(), TOKEN_VARIABLE
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(os.environ.get("HF_HOME") or cache / "huggingface") / "token")
    try:
        return file.expanduser().read_text().strip() or None, str(file)
    except OSError:
        return None, ""


def is_gated(repo_id: str) -> bool:
    """Return whether a repository is known to be gated; an unknown one may be gated too."""
    return repo_id.startswith(GATED)


def find_gated_problem(model: ModelSection) -> Problem | None:
    """Return why the model or tokenizer cannot be fetched (gated, no token, and not on this machine), or None."""
    if find_hub_token()[0] is not None:
        return None
    fetched = {
        "model.tokenizer": model.tokenizer,
        "model.path": model.path if model.init == "pretrained" or not model.tokenizer else None,
    }
    for key, repo_id in fetched.items():
        if repo_id and is_gated(repo_id) and locate(repo_id, model).folder is None:
            message = f"{repo_id} is gated and not on this machine, and there is no {TOKEN_VARIABLE}"
            page = f"https://huggingface.co/{repo_id}"
            remedy = f"accept its license at {page}, and set {TOKEN_VARIABLE} to a token of that account"
            return Problem(message, key, repo_id, remedy)
    return None


def check_accounts(config: RunConfig) -> list[CheckResult]:
    """Check the logins at both services; results contain no keys."""
    return [*_check_wandb_login(config), *_check_hub_login(config)]


def _check_wandb_login(config: RunConfig) -> Iterator[CheckResult]:
    account = _look_up_wandb_account(config, worker_environment())
    if account is None:
        yield CheckResult(_WANDB, OK, "not needed: the settings track nothing online")
        return
    if account["login"] is None and config.tracking.mode == "auto":
        seen = "no login: runs are tracked offline, to be uploaded later with wandb sync"
        yield CheckResult(_WANDB, WARNING, seen, "wandb login, or export WANDB_API_KEY; or set tracking.mode=offline")
        return
    try:
        notes = _judge_wandb_account(config, account)
    except ConfigError as error:
        yield from (from_problem(problem, name=_WANDB) for problem in error.problems)
        return
    if account["unknown"] or not config.cluster.forwards_environment:
        yield CheckResult(_WANDB, WARNING, "; ".join(notes), "check the network of this machine, or set tracking.mode=offline")
    else:
        yield CheckResult(_WANDB, OK, "; ".join([f"login of {account['login']} accepted", *notes]))


def _check_hub_login(config: RunConfig) -> Iterator[CheckResult]:
    repo_id = config.export.push_to_hub
    if repo_id and (problem := token_problem("export.push_to_hub", repo_id)):
        yield from_problem(problem, name=_HUB)
        return
    token, source = find_hub_token()
    if problem := find_gated_problem(config.model):
        yield from_problem(problem, name=_HUB)
        return
    if token is None:
        yield CheckResult(_HUB, OK, f"no {TOKEN_VARIABLE}: public models only, nothing can be pushed")
        return
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True", "ON", "YES"):
        yield CheckResult(_HUB, OK, f"a token from {source}, not checked because HF_HUB_OFFLINE is set")
        return
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    remedy = f"set {TOKEN_VARIABLE} to a valid token from {_TOKEN_PAGE}"
    try:
        request = urllib.request.Request(f"{endpoint}/api/whoami-v2", headers={"Authorization": f"Bearer {token}"})  # noqa: S310
        user = str(request_json(request, _HUB_DEADLINE_S)["name"])[:_MAX_NAME_CHARS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if getattr(error, "code", None) in (401, 403):
            yield CheckResult(_HUB, FAILURE, f"{endpoint} does not accept the token from {source}", remedy)
            return
        seen = f"{endpoint} does not answer, so the token from {source} was not checked: {error}"
        yield CheckResult(_HUB, WARNING, seen, "check the network, or export HF_HUB_OFFLINE=1 on a machine without one")
    else:
        yield CheckResult(_HUB, OK, f"the token from {source} belongs to {user}")
