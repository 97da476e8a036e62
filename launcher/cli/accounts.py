"""This shell's logins at Weights & Biases and the Hub. W&B itself is not asked: a run that it refuses is tracked offline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from launcher.clusters.check_results import FAILURE, OK, WARNING, CheckResult, from_problem
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError
from launcher.export.hub import TOKEN_VARIABLE, token_problem

_WANDB, _HUB = "W&B", "Hub"
_WANDB_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"  # noqa: S105


def check_wandb(config: RunConfig) -> str | None:
    """Return a note if the ranks of a run that W&B tracks may lack this shell's login, or None."""
    tracking, cluster, login = config.tracking, config.cluster, _find_wandb_login()
    if not _is_tracked(config):
        return None
    if not cluster.forwards_environment:
        # The login of the cluster's nodes counts; it is unknown here. Without one, they track offline.
        return "API keys are not sent to this cluster: its nodes need WANDB_API_KEY in their environment"
    if login is None and tracking.mode == "online":
        remedy = "log in with: wandb login, set WANDB_API_KEY, or set tracking.mode=offline"
        raise ConfigError("there is no login for Weights & Biases", "tracking.mode", "online", remedy)
    if login not in (None, *_WANDB_KEYS) and cluster.netrc_problem is not None:
        return f"{cluster.netrc_problem}: set WANDB_API_KEY in the environment of this command"
    return None


def _is_tracked(config: RunConfig) -> bool:
    return config.tracking.kind == "wandb" and config.tracking.mode in ("auto", "online")


def _find_wandb_login() -> str | None:
    """Return the variable or the netrc file that may hold a login, or None if neither exists."""
    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    return next(filter(os.environ.get, _WANDB_KEYS), str(netrc) if netrc.is_file() and netrc.stat().st_size else None)


def check_accounts(config: RunConfig) -> list[CheckResult]:
    """Check the logins at both services; results contain no keys."""
    return [_check_wandb_login(config), *_check_hub_login(config)]


def _check_wandb_login(config: RunConfig) -> CheckResult:
    login = _find_wandb_login()
    if not _is_tracked(config):
        return CheckResult(_WANDB, OK, "not needed: the settings track nothing online")
    try:
        note = check_wandb(config)
    except ConfigError as error:
        return from_problem(error.problems[0], name=_WANDB)
    remedy = "wandb login, or export WANDB_API_KEY; or set tracking.mode=offline"
    if note is None and login is None:
        note = "no login: runs are tracked offline, to be uploaded later with wandb sync"
    return CheckResult(_WANDB, OK, f"login from {login}") if note is None else CheckResult(_WANDB, WARNING, note, remedy)


def _check_hub_login(config: RunConfig) -> Iterator[CheckResult]:
    from huggingface_hub import get_token, whoami

    repo_id = config.export.push_to_hub
    if repo_id and (problem := token_problem("export.push_to_hub", repo_id)):
        yield from_problem(problem, name=_HUB)
    elif (token := get_token()) is None:
        yield CheckResult(_HUB, OK, f"no {TOKEN_VARIABLE}: public models only, nothing can be pushed")
    else:
        try:
            yield CheckResult(_HUB, OK, f"the token belongs to {whoami(token)['name']}")
        # The client raises the errors of its transport too.
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
                remedy = f"set {TOKEN_VARIABLE} to one from {_TOKEN_PAGE}"
                yield CheckResult(_HUB, FAILURE, "the Hub does not accept the token", remedy)
            else:
                seen = f"the token was not checked, because the Hub did not answer as expected: {error}"
                yield CheckResult(_HUB, WARNING, seen, "check the network of this machine, or try again later")
