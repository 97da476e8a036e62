"""The W&B project of a run: whether this machine's account may write to it, and its workspace.

`python -m launcher.tracking.wandb.project < TRACKING.json` asks W&B before submission and prints an `Account` as JSON. It is a
process of its own because it imports W&B's package for the address and login.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.config.sections.run import TrackingSection
from launcher.security.connections import request_json
from launcher.tracking.metrics import STEP, panels

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
        return check_access(address, key, account, tracking.project)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return replace(account, unknown=f"{address} does not answer: {getattr(error, 'reason', error)}")


def check_access(address: str, key: str, account: Account, project: str) -> Account:
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
    return dict(request_json(request, ANSWER_DEADLINE_S)["data"])


# The workspace


@dataclass(frozen=True)
class Target:
    """The runs of a workspace: all of a project, or the one with `run_id`. `entity` None is the account's default."""

    project: str
    entity: str | None = None
    run_id: str | None = None
    run_name: str | None = None

    @property
    def view(self) -> str:
        """Name of the workspace in its address; always the same, so that it can be updated."""
        return f"launcher{self.run_id or ''}"[:24]


def make_workspace(target: Target) -> Any:
    """Return a `wandb_workspaces.workspaces.Workspace` with a section of panels for each section of the table of metrics."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as ws

    sections = []
    for name, charts in panels().items():
        plots: list[Any] = []
        for chart in charts:
            plot = reports.LinePlot(
                title=chart.title,
                x=STEP,
                y=[] if chart.regex else list(chart.metrics),
                metric_regex=chart.regex,
                title_y=chart.unit or None,
                log_y=chart.log_y or None,
            )
            # W&B stores a user's panel settings under the panel's id, so the id must not change between calls.
            slug = re.sub(r"[^a-z]", "", name.lower())[:4]
            plot._id = slug + hashlib.blake2b(f"{name}/{chart.title}".encode(), digest_size=4).hexdigest()[:7]
            plots.append(plot)
        sections.append(ws.Section(name=name, panels=plots, is_open=True))
    created = ws.Workspace(
        entity=target.entity or "",
        project=target.project,
        name="Launcher" if target.run_id is None else f"Launcher: {target.run_name}",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(filters=[ws.Metric("ID") == target.run_id] if target.run_id is not None else []),
    )
    # W&B would choose a random name, under which it could not be updated.
    created._internal_name = f"nw-{target.view}-v"
    return created


def as_json(target: Target) -> str:
    """Return the workspace as JSON, without a network."""
    model = make_workspace(target)._to_model()
    spec = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    shown = {"entity": target.entity, "project": target.project, "name": model.display_name, "view": target.view, "spec": spec}
    return json.dumps(shown, indent=2)


def publish(target: Target) -> str:
    """Create the workspace or update its sections, keeping sections that people added. Return its address.

    Raises:
        LookupError: if the project does not exist, or this account may not see it.
        Exception: whatever else W&B raises.
    """
    import wandb
    import wandb_workspaces.workspaces as ws

    entity = target.entity or str(wandb.Api().default_entity)
    desired = make_workspace(replace(target, entity=entity))
    try:
        existing = ws.Workspace.from_url(desired.url)
    except ValueError as error:
        if "Project" in str(error):
            raise LookupError(f"{entity}/{target.project}") from error
        return str(desired.save().url)
    ours = {section.name for section in desired.sections}
    existing.sections = [*desired.sections, *(section for section in existing.sections if section.name not in ours)]
    return str(existing.save().url)


if __name__ == "__main__":
    print(json.dumps(asdict(look_up(TrackingSection.model_validate_json(sys.stdin.read())))))
