"""Whether W&B takes a run, asked before machines are asked for: `python -m launcher.tracking.wandb_account < TRACKING.json`.

A process of its own, since W&B's package is imported to learn its address and login. It prints one JSON object: `login` is
environment, netrc, token or None, `refused` says why W&B will not take the run, `unknown` why that could not be found out.
A project that does not exist is no mistake: W&B makes it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from typing import Any

from launcher.config.schema import TrackingSection

ANSWER_DEADLINE_S = 10.0
_QUERY = "query Viewer { viewer { entity username admin teams { edges { node { name } } } } }"


@dataclass(frozen=True)
class Account:
    """What is known of the account that a run would be tracked under."""

    login: str | None = None
    refused: str = ""
    unknown: str = ""


def look_up(tracking: TrackingSection) -> Account:
    """Ask W&B about the login of this machine and the entity of the settings."""
    import wandb
    from wandb.sdk.lib.wbauth import read_netrc_auth

    address = wandb.setup().settings.base_url
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return Account("token")
    login, key = "environment", os.environ.get("WANDB_API_KEY")
    if not key:
        login, key = "netrc", read_netrc_auth(host=address)
    if not key:
        return Account(None, refused=f"there is no login for {address}")
    try:
        viewer = _ask(address, key)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return Account(login, refused=f"{address} does not accept the key")
        return Account(login, unknown=f"{address} answers with HTTP {error.code}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Account(login, unknown=f"{address} does not answer: {getattr(error, 'reason', error)}")
    if viewer is None:
        return Account(login, refused=f"{address} does not accept the key")
    own = {viewer["entity"], viewer["username"], *(edge["node"]["name"] for edge in viewer["teams"]["edges"])} - {None}
    if tracking.entity is None or tracking.entity in own or viewer.get("admin"):
        return Account(login)
    return Account(login, refused=f"{viewer['username']} may not write to {tracking.entity}, but to {', '.join(sorted(own))}")


def _ask(address: str, key: str) -> dict[str, Any] | None:
    credentials = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
    body = json.dumps({"query": _QUERY, "variables": {}}).encode()
    request = urllib.request.Request(f"{address.rstrip('/')}/graphql", body, headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=ANSWER_DEADLINE_S) as answer:  # noqa: S310
        viewer: dict[str, Any] | None = json.load(answer)["data"]["viewer"]
    return viewer


if __name__ == "__main__":
    print(json.dumps(asdict(look_up(TrackingSection.model_validate_json(sys.stdin.read())))))
