"""The workspace of a W&B project: the table of metrics as panels."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from launcher.tracking.metrics import STEP, panels


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
