"""This shell's logins at Weights & Biases and the Hub: whether they exist and, if the service answers, are valid."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator

from launcher.cli.accounts import hub_access, wandb_check
from launcher.cli.worker_process import worker_environment
from launcher.clusters.check_results import FAILURE, OK, WARNING, CheckResult, from_problem
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError
from launcher.export import hub
from launcher.security.credentials import request_json

_ANSWER_DEADLINE_S = 10.0
_MAX_NAME_CHARS = 100
_WANDB, _HUB = "W&B", "Hub"
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"  # noqa: S105


def check_accounts(config: RunConfig) -> list[CheckResult]:
    """Check the logins at both services; results contain no keys."""
    return [*_check_wandb(config), *_check_hub(config)]


def _check_wandb(config: RunConfig) -> Iterator[CheckResult]:
    account = wandb_check.look_up_account(config, worker_environment())
    if account is None:
        yield CheckResult(_WANDB, OK, "not needed: the settings track nothing online")
        return
    if account["login"] is None and config.tracking.mode == "auto":
        seen = "no login: runs are tracked offline, to be uploaded later with wandb sync"
        yield CheckResult(_WANDB, WARNING, seen, "wandb login, or export WANDB_API_KEY; or set tracking.mode=offline")
        return
    try:
        notes = wandb_check.judge_account(config, account)
    except ConfigError as error:
        yield from (from_problem(problem, name=_WANDB) for problem in error.problems)
        return
    if account["unknown"] or not config.cluster.forwards_environment:
        yield CheckResult(_WANDB, WARNING, "; ".join(notes), "check the network of this machine, or set tracking.mode=offline")
    else:
        yield CheckResult(_WANDB, OK, "; ".join([f"login of {account['login']} accepted", *notes]))


def _check_hub(config: RunConfig) -> Iterator[CheckResult]:
    repo_id = config.export.push_to_hub
    if repo_id and (problem := hub.token_problem("export.push_to_hub", repo_id)):
        yield from_problem(problem, name=_HUB)
        return
    token, source = hub_access.find_token()
    if problem := hub_access.gated_problem(config.model):
        yield from_problem(problem, name=_HUB)
        return
    if token is None:
        yield CheckResult(_HUB, OK, f"no {hub.TOKEN_VARIABLE}: public models only, nothing can be pushed")
        return
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True", "ON", "YES"):
        yield CheckResult(_HUB, OK, f"a token from {source}, not checked because HF_HUB_OFFLINE is set")
        return
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    remedy = f"set {hub.TOKEN_VARIABLE} to a valid token from {_TOKEN_PAGE}"
    try:
        request = urllib.request.Request(f"{endpoint}/api/whoami-v2", headers={"Authorization": f"Bearer {token}"})  # noqa: S310
        user = str(request_json(request, _ANSWER_DEADLINE_S)["name"])[:_MAX_NAME_CHARS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if getattr(error, "code", None) in (401, 403):
            yield CheckResult(_HUB, FAILURE, f"{endpoint} does not accept the token from {source}", remedy)
            return
        seen = f"{endpoint} does not answer, so the token from {source} was not checked: {error}"
        yield CheckResult(_HUB, WARNING, seen, "check the network, or export HF_HUB_OFFLINE=1 on a machine without one")
    else:
        yield CheckResult(_HUB, OK, f"the token from {source} belongs to {user}")
