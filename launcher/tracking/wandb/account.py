"""Whether W&B takes a run, asked before machines are asked for: `python -m launcher.tracking.wandb.account < TRACKING.json`.

A process of its own, since W&B's package is imported to learn its address and login. It prints one JSON object: `login` is
environment, netrc, token or None, `refused` says why W&B will not take the run, `unknown` why that could not be found out,
`note` what else a person should know. A project that does not exist is no mistake: W&B makes it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.config.schema import TrackingSection

ANSWER_DEADLINE_S = 10.0
_VIEWER = "query Viewer { viewer { entity username admin teams { edges { node { name } } } } }"
# What W&B's own package asks of an entity; it is null where there is none, or none that the key may see.
_ENTITY = "query EntityIsTeam($entity: String!) { entity(name: $entity) { id isTeam } }"
# Likewise of a project before it changes anything there.
_PROJECT = (
    "query IsProjectReadOnly($entity: String!, $project: String!) { project(entityName: $entity, name: $project) { readOnly } }"
)


@dataclass(frozen=True)
class Account:
    """What is known of the account that a run would be tracked under, in `entity` where one is named."""

    login: str | None = None
    refused: str = ""
    unknown: str = ""
    note: str = ""
    entity: str | None = None


def look_up(tracking: TrackingSection) -> Account:
    """Ask W&B about the login of this machine, and the entity and the project of the settings; W&B's own entity where these
    name none.
    """
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
    account = Account(login, entity=entity)
    try:
        return _answer(address, key, account, tracking.project)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return replace(account, unknown=f"{address} does not answer: {getattr(error, 'reason', error)}")


def _answer(address: str, key: str, account: Account, project: str) -> Account:
    """The account with what W&B says of it: why it refuses the run, and what it leaves open."""
    try:
        viewer = _ask(address, key, _VIEWER)["viewer"]
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return replace(account, refused=f"{address} does not accept the key")
        # Other refusals may be those of a proxy on the way.
        return replace(account, unknown=f"{address} answers with HTTP {error.code}")
    if viewer is None:
        return replace(account, refused=f"{address} does not accept the key")
    user, entity = viewer["username"], account.entity
    owner = entity or viewer["entity"] or user
    path = f"{owner}/{project}"
    found = _ask(address, key, _PROJECT, entity=owner, project=project)["project"]
    if found is not None:
        # Some projects are open to those who are no members.
        return replace(account, refused=f"{user} may read the project {path}, not write to it" if found["readOnly"] else "")
    own = {viewer["entity"], user, *(edge["node"]["name"] for edge in viewer["teams"]["edges"])} - {None}
    if entity is None or entity.casefold() in {name.casefold() for name in own} or viewer.get("admin"):
        return replace(account, note=f"W&B makes the project {path}: there is none yet, or none that {user} may see")
    known = f"{user} is known to write to {', '.join(sorted(own))}"
    if _ask(address, key, _ENTITY, entity=entity)["entity"] is None:
        return replace(account, refused=f"there is no entity {entity} that {user} may see; {known}")
    # Service accounts and administrators of an organisation may write where they are no members.
    return replace(account, unknown=f"{user} is no member of {entity}; {known}")


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
