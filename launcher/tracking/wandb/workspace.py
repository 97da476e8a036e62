"""The W&B workspace of a run or a project: which panels it has, and how it is kept up to date."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from launcher.tracking.metrics import STEP, panels


@dataclass(frozen=True)
class Target:
    """Whose workspace: all runs of a project, or the one with `run_id`. `entity` None is the account's default."""

    project: str
    entity: str | None = None
    run_id: str | None = None
    run_name: str | None = None

    @property
    def title(self) -> str:
        return "Launcher" if self.run_id is None else f"Launcher: {self.run_name}"

    @property
    def view(self) -> str:
        """What stands for the workspace in addresses; always the same, so that it is found again."""
        return f"launcher{self.run_id or ''}"[:24]


def workspace(target: Target) -> Any:
    """The workspace, a `wandb_workspaces.workspaces.Workspace`, as it is made where there is none."""
    import wandb_workspaces.workspaces as ws

    only = [ws.Metric("ID") == target.run_id] if target.run_id is not None else []
    made = ws.Workspace(
        entity=target.entity or "",
        project=target.project,
        name=target.title,
        sections=_sections(),
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(filters=only),
    )
    # W&B would draw a name by lot, under which nobody could find it again.
    made._internal_name = f"nw-{target.view}-v"
    return made


def as_json(target: Target) -> str:
    """What would be sent, for a person to read. No network."""
    model = workspace(target)._to_model()
    spec = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    shown = {"entity": target.entity, "project": target.project, "name": model.display_name, "view": target.view, "spec": spec}
    return json.dumps(shown, indent=2)


def publish(target: Target) -> str:
    """Create the workspace, or bring its sections up to date; sections that people have added stay. Returns its address.

    Raises:
        LookupError: where the project does not exist, or this account may not see it.
        Exception: whatever else W&B raises.
    """
    import wandb
    import wandb_workspaces.workspaces as ws

    entity = target.entity or str(wandb.Api().default_entity)
    target = Target(target.project, entity, target.run_id, target.run_name)
    made = workspace(target)
    try:
        found = ws.Workspace.from_url(made.url)
    except ValueError as error:
        if "Project" in str(error):
            raise LookupError(f"{entity}/{target.project}") from error
        return str(made.save().url)
    ours = {section.name for section in made.sections}
    found.sections = [*made.sections, *(section for section in found.sections if section.name not in ours)]
    return str(found.save().url)


def _sections() -> list[Any]:
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
            # W&B keeps what a person sets on a panel under its id, so the id must not change between calls.
            plot._id = _panel_id(name, chart.title)
            plots.append(plot)
        sections.append(ws.Section(name=name, panels=plots, is_open=True))
    return sections


def _panel_id(section: str, title: str) -> str:
    slug = re.sub(r"[^a-z]", "", section.lower())
    return slug[:4] + hashlib.blake2b(f"{section}/{title}".encode(), digest_size=4).hexdigest()[:7]
