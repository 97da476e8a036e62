"""The verbs train and plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from launcher import facts
from launcher.cli import data, formatting
from launcher.cli.accounts import find_gated_problem
from launcher.cli.follow import follow, interrupted_start
from launcher.cli.formatting import wrap
from launcher.cli.interaction import Interrupts
from launcher.cli.start_run import (
    check_wandb_accounts,
    device_note,
    estimate_run_speed,
    gather_facts,
    location_warning,
    may_start,
    node_devices,
    plan_with_free_name,
    prepare_plan,
    print_plan,
    start_run,
)
from launcher.cli.verbs import flags_of
from launcher.cli.views.memory_view import why_lines
from launcher.cli.views.plan_view import LABEL_WIDTH, plan_json, plan_lines, started_lines, sweep_lines
from launcher.clusters.backends import cluster_for
from launcher.clusters.preflight import disk_note
from launcher.config.compose import Composed, require_distinct_runs, run_hydra
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_REFUSED
from launcher.models.found_model import find_model
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import run_dir_of
from launcher.plan.run_dir import RunDir
from launcher.shell_commands import launcher_command

_FOLLOW = {"follow=true": True, "follow=false": False}


def train(arguments: argparse.Namespace) -> int:
    """Start the run of a command line or, with -m, one per job; returns the largest exit code."""
    jobs = _compose("train", [token for token in arguments.overrides if token not in _FOLLOW])
    follows = next((_FOLLOW[token] for token in arguments.overrides if token in _FOLLOW), arguments.follow)
    if any(job.config.cluster.runs_on_every_node for job in jobs):
        from launcher.cli import every_node

        return every_node.train(jobs, follows, arguments.yes)
    plans: list[LaunchPlan] = []
    check_wandb_accounts(jobs)
    for note in dict.fromkeys(job.origins.dropped_note() for job in jobs):
        if note is not None:
            print(f"note: {note}", flush=True)
    # All jobs have passed their checks before one starts.
    for composed in _group_jobs(jobs):
        with composed.located():
            plans.append(prepare_plan(composed, taken_names={plan.run_name for plan in plans}))
    return start_all(plans, follows) if may_start(plans, arguments.yes) else EXIT_REFUSED


def show_plans(arguments: argparse.Namespace) -> int:
    """Print the plan of a command line or, with -m, one per job."""
    taken_names: set[str] = set()
    jobs = _compose("plan", arguments.overrides)
    return max((_show_plan(job, arguments.json, arguments.why, arguments.script, taken_names) for job in jobs), default=0)


def _compose(verb: str, tokens: Sequence[str]) -> list[Composed]:
    jobs: list[Composed] = []
    run_hydra(tokens, jobs.append, flags_of(verb))
    require_distinct_runs(jobs)
    return jobs


def _show_plan(composed: Composed, as_json: bool, why: bool, shows_script: bool, taken_names: set[str]) -> int:
    with composed.located():
        cluster = cluster_for(composed.config.cluster.kind)
        node = node_devices(composed, cluster)
        config = facts.resolve(composed.config, node)
        found = find_model(config.model)
        plan = plan_with_free_name(config, gather_facts(config, found, composed, node, runs_code=False), taken_names)
        taken_names.add(plan.run_name)
        gated = find_gated_problem(config.model)
        notes = (
            device_note(plan, cluster),
            disk_note(plan),
            found.weights_note,
            data.summarize_findings(plan, fatal=True),
            f"train will be refused: {gated.message}; {gated.remedy}" if gated else None,
            composed.origins.dropped_note(),
        )
        speed = estimate_run_speed(plan, node)
        own_warnings = (location_warning(plan), _name_warning(config))
        if as_json:
            print(plan_json(plan, *notes, own_warnings=own_warnings, speed=speed, why=why))
            return 0
        print("\n".join(wrap(plan_lines(plan, *notes, own_warnings=own_warnings, speed=speed), LABEL_WIDTH)))
        if why:
            print("\n".join(why_lines(plan)))
        if line := _preview_script(cluster.preview(plan), shows_script):
            print(line)
    return 0


def _name_warning(config: RunConfig) -> str | None:
    """Describe the run with this run.name, which `train` would refuse to replace, or return None if the name is free."""
    if config.run.name is None:
        return None
    run = RunDir(run_dir_of(config, config.run.name, str(Path.cwd()), str(Path.home())))
    if not run.root.exists():
        return None
    remedy = f"look at it with {launcher_command('status', formatting.short(run.root))}, or choose another run.name"
    return f"train will be refused: the run {config.run.name} exists already; {remedy}"


def _preview_script(text: str | None, is_wanted: bool) -> str:
    """Return what a scheduler would get, or one line on how to see it; empty if there is nothing to see."""
    if text is None:
        return f"{'script':<{LABEL_WIDTH}}none: this machine starts the ranks itself" if is_wanted else ""
    if is_wanted:
        return f"\n{text.rstrip()}"
    count = text.count("\n")
    # A script has more than a few lines.
    return f"{'script':<{LABEL_WIDTH}}plan --script shows what the scheduler gets ({count} lines)" if count > 1 else text.rstrip()


def start_all(plans: list[LaunchPlan], follows: bool | None) -> int:
    """Show and start each run, and follow it if requested; returns the largest exit code. After Ctrl-C, no further run starts."""
    codes = []
    started = []
    for number, plan in enumerate(plans, 1):
        cluster = cluster_for(plan.config.cluster.kind)
        print_plan(plan, cluster)
        with Interrupts() as interrupts:
            interrupts.defer()
            run_dir, attempt = start_run(plan, cluster)
            started.append((plan, cluster.submission_details(run_dir, attempt)))
            if plan.config.cluster.is_followed if follows is None else follows:
                codes.append(follow(run_dir, attempt, cluster, interrupts))
            else:
                print("\n".join(started_lines(run_dir.root, cluster.submission_details(run_dir, attempt))), flush=True)
                if interrupts.received:
                    codes.append(interrupted_start(run_dir))
        if interrupts.received:
            if rest := [plan.run_name for plan in plans[number:]]:
                print(f"not started: {', '.join(rest)}", flush=True)
            break
    if len(started) > 1:
        print("\n".join(sweep_lines(started)))
    return max(codes, default=0)


def _group_jobs(jobs: list[Composed]) -> list[Composed]:
    """Give the runs of a sweep a common W&B group, unless the user has set one."""
    if len(jobs) < 2:
        return jobs
    group = f"sweep-{datetime.now():%Y%m%d-%H%M%S}"
    with_groups = []
    for job in jobs:
        tracking = job.config.tracking
        with_group = tracking if tracking.group else tracking.model_copy(update={"group": group})
        with_groups.append(replace(job, config=job.config.model_copy(update={"tracking": with_group})))
    return with_groups
