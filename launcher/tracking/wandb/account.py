"""Check before submission whether W&B accepts a run: `python -m launcher.tracking.wandb.account < TRACKING.json`.

This is a separate process because it imports W&B's package for the address and login. It prints an `Account` as JSON. A missing
project is not an error: W&B creates it.
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

from launcher.config.sections.run import TrackingSection
from launcher.security.redaction import request_json

ANSWER_DEADLINE_S = 10.0
_VIEWER = "query Viewer { viewer { entity username admin teams { edges { node { name } } } } }"
# The W&B package's query for an entity; null if the entity does not exist or the key may not see it.
_ENTITY = "query EntityIsTeam($entity: String!) { entity(name: $entity) { id isTeam } }"
# Its query for a project before it changes anything there.
_PROJECT = (
    "query IsProjectReadOnly($entity: String!, $project: String!) { project(entityName: $entity, name: $project) { readOnly } }"
)


@dataclass(frozen=True)
class Account:
    """The account that would track a run.

    Attributes:
        login: source of the login: environment, netrc or token; None without one.
        refused: why W&B will not accept the run; empty if it will, or if that is unknown.
        unknown: why the check failed; empty if it did not.
        note: other information for the user.
        entity: entity of the run, if one is named.
    """

    login: str | None = None
    refused: str = ""
    unknown: str = ""
    note: str = ""
    entity: str | None = None


def look_up(tracking: TrackingSection) -> Account:
    """Ask W&B about this machine's login and the settings' project and entity (by default W&B's own entity)."""
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
            return Account("netrc", refused=f"the netrc entry for {address} is not a valid key")
    if not key:
        return Account(None, refused=f"there is no login for {address}")
    account = Account(login, entity=entity)
    try:
        return _check_access(address, key, account, tracking.project)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return replace(account, unknown=f"{address} does not answer: {getattr(error, 'reason', error)}")


def _check_access(address: str, key: str, account: Account, project: str) -> Account:
    """Return the account with W&B's answer."""
    try:
        viewer = _query(address, key, _VIEWER)["viewer"]
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return replace(account, refused=f"{address} does not accept the key")
        # Other refusals may come from a proxy.
        return replace(account, unknown=f"{address} answers with HTTP {error.code}")
    if viewer is None:
        return replace(account, refused=f"{address} does not accept the key")
    user, entity = viewer["username"], account.entity
    owner = entity or viewer["entity"] or user
    path = f"{owner}/{project}"
    project_record = _query(address, key, _PROJECT, entity=owner, project=project)["project"]
    if project_record is not None:
        # Some projects are open to users who are not members.
        return replace(
            account, refused=f"{user} may read the project {path} but not write to it" if project_record["readOnly"] else ""
        )
    own = {viewer["entity"], user, *(edge["node"]["name"] for edge in viewer["teams"]["edges"])} - {None}
    if entity is None or entity.casefold() in {name.casefold() for name in own} or viewer.get("admin"):
        return replace(account, note=f"W&B will create the project {path}: it does not exist, or {user} may not see it")
    permissions = f"{user} may write to {', '.join(sorted(own))}"
    if _query(address, key, _ENTITY, entity=entity)["entity"] is None:
        return replace(account, refused=f"there is no entity {entity} that {user} may see; {permissions}")
    # Service accounts and organization administrators may write where they are not members.
    return replace(account, unknown=f"{user} is not a member of {entity}; {permissions}")


def _query(address: str, key: str, query: str, **variables: str) -> dict[str, Any]:
    credentials = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{address.rstrip('/')}/graphql", body, headers)  # noqa: S310
    data: dict[str, Any] = request_json(request, ANSWER_DEADLINE_S)["data"]
    return data


if __name__ == "__main__":
    print(json.dumps(asdict(look_up(TrackingSection.model_validate_json(sys.stdin.read())))))
