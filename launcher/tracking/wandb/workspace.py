"""The W&B workspace of a run or a project: which panels it has, and how it is kept up to date."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

STEP = "trainer/step"


@dataclass(frozen=True)
class Chart:
    """Metrics over the steps. `metrics` may be one regular expression, written /like this/; `log_y` draws their logarithm."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    log_y: bool = False


SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Training": (
        Chart("Loss per trained token", ("train/loss", "eval/held_out/loss")),
        Chart("Held-out perplexity", ("eval/held_out/ppl",)),
        Chart("Learning rate", ("train/lr",)),
        Chart("Tokens seen", ("trainer/tokens",)),
        Chart("Progress", ("trainer/progress",)),
        Chart("Time left", ("trainer/eta_s",), "s"),
    ),
    "Throughput": (
        Chart("Tokens per second", ("perf/tokens_per_sec",)),
        Chart("Tokens per second and GPU", ("perf/tokens_per_sec_per_gpu",)),
        Chart("MFU", ("perf/mfu",)),
        Chart("TFLOP/s per GPU", ("perf/tflops_per_gpu",)),
        Chart("Time of evaluations, and of waiting for saves", ("time/eval_s", "time/ckpt_s"), "s"),
        Chart("Step time and its parts", ("time/step_s", "time/data_s", "time/fwd_bwd_s", "time/optim_s"), "s"),
        Chart("Goodput", ("perf/goodput",)),
    ),
    "Memory": (
        Chart("GPU memory at the peak", ("memory/peak_active_gib", "memory/peak_reserved_gib"), "GiB"),
        Chart("Allocations that had to be tried again", ("memory/alloc_retries",)),
        Chart("Main memory of rank 0", ("memory/host_rss_gib",), "GiB"),
    ),
    "Stability": (
        Chart("Gradient norm", ("train/grad_norm",), log_y=True),
        Chart("Skipped steps", ("train/skipped_steps",)),
        Chart("Slowest rank against the median rank", ("time/straggler_ratio",)),
        Chart("Longest step of any rank", ("time/step_s", "time/step_max_rank_s"), "s"),
        Chart("Restarts", ("run/restarts", "run/attempt")),
        Chart("Steps trained again", ("run/lost_steps",)),
    ),
    "Data": (
        Chart("Share of trained tokens", ("data/label_frac",)),
        Chart("Padding", ("perf/padding_frac",)),
        Chart("Tokens cut off", ("data/truncated_frac",)),
        Chart("Share of each source", (r"/^data\/source\/.+\/frac$/",)),
        Chart("Epochs", ("trainer/epoch",)),
        Chart("Wait for data", ("time/data_s",), "s"),
    ),
    "Checkpoints": (
        Chart("Step of the last checkpoint", ("ckpt/last_step",)),
        Chart("Time to save, and training stood still", ("ckpt/save_s", "ckpt/stall_s"), "s"),
        Chart("Size", ("ckpt/bytes",), "bytes"),
        Chart("Free disk", ("ckpt/disk_free_gib",), "GiB"),
    ),
    "Cluster": (
        Chart("GPU utilisation, mean and lowest", ("gpu/util_mean", "gpu/util_min")),
        Chart("Hottest GPU", ("gpu/temp_max",), "°C"),
        Chart("Power per GPU", ("gpu/power_mean",), "W"),
        Chart("Fullest GPU memory", ("gpu/memory_max_frac",)),
        Chart("GPU faults (Xid)", ("gpu/xids",)),
        Chart("CPU and main memory of the nodes", ("host/cpu_util_mean", "host/ram_used_max_frac")),
        Chart("Nodes", ("run/nodes",)),
    ),
    "Cost": (
        Chart("Cost", ("cost/usd",), "US dollars"),
        Chart("GPU hours", ("cost/gpu_hours",), "h"),
        Chart("Cost of a million tokens", ("cost/usd_per_million_tokens",), "US dollars"),
        Chart("Share of time on steps that were kept", ("perf/goodput",)),
        Chart("Time that was lost, by cause", (r"/^lost\/.+_s$/",), "s"),
    ),
}


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
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws

    sections = []
    for name, charts in SECTIONS.items():
        plots: list[Any] = []
        for chart in charts:
            regex = chart.metrics[0].strip("/") if chart.metrics[0].startswith("/") else None
            plot = panels.LinePlot(
                title=chart.title,
                x=STEP,
                y=[] if regex else list(chart.metrics),
                metric_regex=regex,
                title_y=chart.unit or None,
                log_y=chart.log_y or None,
            )
            # What a person sets on a panel is kept under its id, so that must not change from one call to the next.
            plot._id = _panel_id(name, chart.title)
            plots.append(plot)
        sections.append(ws.Section(name=name, panels=plots, is_open=True))
    return sections


def _panel_id(section: str, title: str) -> str:
    slug = re.sub(r"[^a-z]", "", section.lower())
    return slug[:4] + hashlib.blake2b(f"{section}/{title}".encode(), digest_size=4).hexdigest()[:7]
