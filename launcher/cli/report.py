"""The verbs report and dashboard: runs on one self-contained page, and in a workspace of W&B."""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import clock
from launcher.checkpoint import store
from launcher.checkpoint.manifest import describe_loss
from launcher.cli.evaluate import show_verdicts
from launcher.cli.plan import plan_rows
from launcher.cli.render import html
from launcher.cli.render.sections import BarChart, Cards, ChartCurve, Charts, LineChart, Part, Section, Table, Text
from launcher.clusters.backends import status_reader_for
from launcher.errors import ConfigError, RunError, SubmitError, describe
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_size, list_first
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.runs.run_records import RUNNING_STATES, Attempt, Status
from launcher.security import folders
from launcher.shell_commands import short_path
from launcher.tracking import goodput
from launcher.tracking.goodput import Breakdown
from launcher.tracking.jsonl import continued_lines, iter_lines, merge_steps, read_events
from launcher.tracking.metrics import curves, format_duration
from launcher.tracking.run_metrics import find_overfitting, newest_trained_step
from launcher.tracking.wandb import project

_MOST_POINTS = 600
_NODES_SHOWN = 8
# Names, or prefixes of names, of the metrics that the page needs in addition to the charts' metrics.
_OTHER_METRICS = ("eval/", "time/eval_s", "ckpt/stall_s", "trainer/tokens", "trainer/epoch")
_PROJECT = re.compile(r"(?:(?P<entity>[\w.-]+)/)?(?P<project>[\w.-]+)")


@dataclass(frozen=True)
class _RunFiles:
    """Contents of a run's files. `lines` has all lines of metrics.jsonl, `steps` one per step; both hold what the page needs."""

    name: str
    run: RunDir
    plan: LaunchPlan
    status: Status
    lines: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    spent: Breakdown


def write_report(arguments: argparse.Namespace) -> int:
    """Write the page and print its path."""
    named = [run_store.find_run(name, arguments.root) for name in arguments.runs]
    runs = list({run.root: run for run in named}.values())
    file = arguments.html or (runs[0].root if len(runs) == 1 else Path()) / "report.html"
    has_same_names = len({run.root.name for run in runs}) < len(runs)
    html.write(file, page([_read_run_files(run, short_path(run.root) if has_same_names else run.root.name) for run in runs]))
    print(f"page: {short_path(file.absolute())}")
    return 0


def _read_run_files(run: RunDir, name: str) -> _RunFiles:
    plan = run_store.load_plan(run)
    lines = list(iter_lines(run.metrics, (*curves(), *_OTHER_METRICS)))
    status = status_reader_for(run, plan.config.cluster.kind).status(run)
    events = read_events(run.events)
    spent = goodput.read(run, clock.now(), status.state)
    return _RunFiles(name, run, plan, status, lines, merge_steps(continued_lines(lines)), events, spent)


def page(runs: Sequence[_RunFiles]) -> str:
    """Return the whole page: the curves of all runs in shared charts, then each run by itself."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    charts: list[LineChart | BarChart] = []
    for metric, drawn in curves().items():
        of_runs = []
        for one in runs:
            if points := [(line["trainer/step"], line[metric] * drawn.scale) for line in one.steps if metric in line]:
                steps, values = zip(*thin_out(points, _MOST_POINTS), strict=True)
                of_runs.append(ChartCurve(one.name, steps, values))
        if of_runs:
            charts.append(LineChart(drawn.title, of_runs, "step", drawn.unit))
    facts_of_runs = [_list_facts(one) for one in runs]
    parts: list[Part] = [Cards(list(facts_of_runs[0].items()))]
    if len(runs) > 1:
        labels = list(dict.fromkeys(label for facts in facts_of_runs for label in facts))
        rows = [[one.name, *(facts.get(label, "-") for label in labels)] for one, facts in zip(runs, facts_of_runs, strict=True)]
        parts = [Table(["run", *labels], rows, numbers=range(2, len(labels) + 1))]
    parts.append(Section("Curves", [Charts(charts) if charts else Text("nothing has been logged yet", "soft")]))
    for one in runs:
        parts += _list_sections(one) if len(runs) == 1 else [Section(one.name, _list_sections(one))]
    return html.to_page(title, f"written {time.strftime('%Y-%m-%d %H:%M:%S %Z')}", parts)


def _list_facts(one: _RunFiles) -> dict[str, str]:
    """Return the main numbers by label."""
    last = next((line for line in reversed(one.steps) if "train/loss" in line), None)
    max_steps = f"{one.status.max_steps:,}" if one.status.max_steps else "?"
    facts = {"state": one.status.state, "steps": f"{newest_trained_step(one.run, one.status):,} of {max_steps}"}
    if last is not None:
        facts |= {"training loss": f"{last['train/loss']:.4f}", "tokens": f"{last.get('trainer/tokens', 0):,.0f}"}
    if evals := [line["eval/held_out/loss"] for line in one.steps if "eval/held_out/loss" in line]:
        facts["best held-out loss"] = f"{min(evals):.4f}"
    if overfitting := find_overfitting(one.steps):
        since = f"step {overfitting.step:,}" if overfitting.epoch is None else f"epoch {overfitting.epoch:.1f}"
        facts["overfitting since"] = f"{since} (gap {overfitting.gap:.4f})"
    facts |= {"since submission": format_duration(one.spent.wall_s), "goodput": f"{one.spent.goodput:.1%}"}
    if one.spent.lost_steps:
        facts["lost steps"] = f"{one.spent.lost_steps:,}"
    # The last line of metrics lacks the last save, the export, and attempts that never trained.
    tokens = 0 if last is None else int(last.get("trainer/tokens", 0))
    counted = goodput.compute_cost(one.plan, one.spent, tokens)
    if counted:
        facts["GPU hours" if one.plan.topology.device == "cuda" else "rank hours"] = f"{counted['cost/gpu_hours']:,.2f}"
    of = " at a typical price" if one.spent.assumed_usd else ""
    if "cost/usd" in counted:
        facts["cost"] = f"${counted['cost/usd']:,.2f}{of}"
    if tokens and "cost/usd_per_million_tokens" in counted:
        facts["cost per million tokens"] = f"${counted['cost/usd_per_million_tokens']:,.2f}{of}"
    return facts


def thin_out(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most `most` points: the lowest and the highest of each interval, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    extremes: list[tuple[float, float]] = []
    size = math.ceil(len(points) / (most // 2))
    for start in range(0, len(points), size):
        stretch = [point for point in points[start : start + size] if math.isfinite(point[1])]
        if stretch:
            ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
            extremes += sorted(ends)
    return extremes


def _list_sections(one: _RunFiles) -> list[Section]:
    """Return what the page shows about a single run."""
    spent = one.spent
    shares = [("kept steps", spent.kept_s), *((label, getattr(spent, name)) for name, label in goodput.LOST.items())]
    bars = [(label, seconds, f"{seconds / max(spent.wall_s, 1e-9):.1%}, {format_duration(seconds)}") for label, seconds in shares]
    checkpoints = [
        [
            f"{checkpoint.step:,}",
            format_size(sum(entry.size for entry in checkpoint.manifest.files.values())),
            describe_loss(checkpoint.eval_loss, checkpoint.eval_set),
            str(checkpoint.manifest.attempt),
            str(checkpoint.manifest.world_size),
        ]
        for checkpoint in store.list_checkpoints(one.run.checkpoints)
    ]
    saved: Part = Text("none", "soft")
    if checkpoints:
        saved = Table(["step", "size", "evaluation loss", "attempt", "ranks"], checkpoints, numbers=range(5))
    alerts = [
        [_format_time(event["time"]), str(event["step"] or ""), event["text"]] for event in one.events if event["kind"] == "alert"
    ]
    verdicts = show_verdicts(one.run, one.plan)
    return [
        *([Section("Did fine-tuning help?", verdicts)] if verdicts else []),
        Section("Where the time went", [Charts([BarChart(f"Of {format_duration(spent.wall_s)} since submission", bars)])]),
        Section("Attempts", [_list_attempts(one)]),
        Section("Checkpoints", [saved]),
        Section("Plan", [plan_rows(one.plan)]),
        *([Section("Alerts", [Table(["time", "step", "alert"], alerts, numbers=[1])])] if alerts else []),
    ]


def _list_attempts(one: _RunFiles) -> Table:
    rows, unnamed_node = [], one.plan.config.cluster.unnamed_node
    for number in run_store.attempt_numbers(one.run):
        attempt = run_store.find_attempt(one.run, number) or Attempt(None)
        record = journal.read_end(one.run, number)
        steps = [line["trainer/step"] for line in one.lines if line["attempt"] == number]
        is_running = one.status.state in RUNNING_STATES and number == run_store.newest_attempt(one.run)
        if record is not None:
            outcome = ": ".join(filter(None, (record.cause, record.message)))
        elif attempt.begun_at is None:
            outcome = "waiting for machines" if is_running else "never started"
        else:
            # A pending run with a begun attempt has lost that attempt's machines.
            outcome = "running" if is_running and one.status.state != "pending" else "ended without a record"
        rows.append(
            [
                str(number),
                str(attempt.resume_step or 0),
                list_first([*dict.fromkeys(attempt.nodes)], _NODES_SHOWN) or unnamed_node,
                f"{max(steps):,.0f}" if steps else "-",
                _format_time(record.ended_at) if record is not None and record.ended_at else "-",
                outcome,
            ]
        )
    return Table(["attempt", "from step", "nodes", "to step", "ended", "outcome"], rows, numbers=[1, 3])


def _format_time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def publish_workspace(arguments: argparse.Namespace) -> int:
    """Create or update the workspace and print its address, or print what would be sent."""
    name = arguments.target
    try:
        run_dir: RunDir | None = run_store.find_run(name, arguments.root)
    except SubmitError:
        run_dir = None
    if run_dir is not None:
        # It names the project that this user's key writes to.
        folders.require_run(run_dir.root)
        plan = run_store.load_plan(run_dir)
        tracking = plan.config.tracking
        target = project.Target(tracking.project, tracking.entity, plan.wandb_id, plan.run_name)
    elif (matched := _PROJECT.fullmatch(name)) is not None:
        target = project.Target(matched["project"], matched["entity"])
    else:
        message, remedy = "this is neither a run nor a W&B project", "write RUN, PROJECT or ENTITY/PROJECT"
        raise ConfigError(message, where="dashboard", value=name, remedy=remedy)
    if arguments.dry_run:
        print(project.as_json(target))
        return 0
    # Keep W&B's own lines out of the output.
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        address = project.publish(target)
    except LookupError as error:
        raise ConfigError(
            "no such W&B project, or this login cannot see it",
            where="dashboard",
            value=str(error),
            remedy="a project is created by its first online run; name a run of ./runs, or PROJECT or ENTITY/PROJECT",
        ) from None
    except Exception as error:  # W&B raises far more than wandb.Error.
        raise RunError(
            f"Weights & Biases did not accept the workspace: {describe(error)}",
            where="dashboard",
            remedy="check that the server is reachable, and the key (`wandb login`, or WANDB_API_KEY); "
            "--dry-run shows the workspace without it",
        ) from error
    print(f"dashboard: {address}")
    return 0
