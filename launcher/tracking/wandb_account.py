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
_VIEWER = "query Viewer { viewer { entity username admin teams { edges { node { name } } } } }"
# What W&B's own package asks of an entity; it is null where there is none, or none that the key may see.
_ENTITY = "query EntityIsTeam($entity: String!) { entity(name: $entity) { id isTeam } }"


@dataclass(frozen=True)
class Account:
    """What is known of the account that a run would be tracked under, in `entity` where one is named."""

    login: str | None = None
    refused: str = ""
    unknown: str = ""
    entity: str | None = None


def look_up(tracking: TrackingSection) -> Account:
    """Ask W&B about the login of this machine and the entity of the settings, or of W&B's own where these name none."""
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib.wbauth import read_netrc_auth

    settings = wandb_setup.singleton().settings
    address, entity = settings.base_url, tracking.entity or settings.entity
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return Account("token", entity=entity)
    login, key = "environment", os.environ.get("WANDB_API_KEY")
    if not key:
        try:
            login, key = "netrc", read_netrc_auth(host=address)
        except AuthenticationError:
            return Account("netrc", refused=f"what netrc holds for {address} is no key")
    if not key:
        return Account(None, refused=f"there is no login for {address}")
    try:
        refused, unknown = _answer(address, key, entity)
    except (OSError, ValueError, KeyError, TypeError) as error:
        refused, unknown = "", f"{address} does not answer: {getattr(error, 'reason', error)}"
    return Account(login, refused, unknown, entity)


def _answer(address: str, key: str, entity: str | None) -> tuple[str, str]:
    """Why W&B refuses the run, and what it leaves open, in words."""
    try:
        viewer = _ask(address, key, _VIEWER)["viewer"]
    except urllib.error.HTTPError as error:
        # Other refusals may be those of a proxy on the way.
        return (
            (f"{address} does not accept the key", "") if error.code == 401 else ("", f"{address} answers with HTTP {error.code}")
        )
    if viewer is None:
        return f"{address} does not accept the key", ""
    own = {viewer["entity"], viewer["username"], *(edge["node"]["name"] for edge in viewer["teams"]["edges"])} - {None}
    if entity is None or entity.casefold() in {name.casefold() for name in own} or viewer.get("admin"):
        return "", ""
    known = f"{viewer['username']} is known to write to {', '.join(sorted(own))}"
    if _ask(address, key, _ENTITY, entity=entity)["entity"] is None:
        return f"there is no entity {entity} that {viewer['username']} may see; {known}", ""
    # Service accounts and administrators of an organisation may write where they are no members.
    return "", f"{viewer['username']} is no member of {entity}; {known}"


def _ask(address: str, key: str, query: str, **variables: str) -> dict[str, Any]:
    credentials = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{address.rstrip('/')}/graphql", body, headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=ANSWER_DEADLINE_S) as answer:  # noqa: S310
        data: dict[str, Any] = json.load(answer)["data"]
    return data


if __name__ == "__main__":
    print(json.dumps(asdict(look_up(TrackingSection.model_validate_json(sys.stdin.read())))))
