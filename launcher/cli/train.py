"""The verbs train and resume: plan, prepare, start, and follow runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from launcher.cli.follow import Interrupts, follow, interrupted_start
from launcher.cli.plan import compose_jobs, print_plan
from launcher.cli.render import terminal
from launcher.cli.render.sections import Table
from launcher.cli.resume import resume_run
from launcher.cli.start_run import may_start, prepare_plan, show_started, start_run
from launcher.clusters.backends import cluster_for
from launcher.errors import EXIT_REFUSED
from launcher.plan.launch_plan import LaunchPlan
from launcher.runs import run_store
from launcher.security import folders


def train(arguments: argparse.Namespace) -> int:
    """Start the run of a command line or, with -m, one per job; returns the largest exit code."""
    jobs, follows = compose_jobs("train", arguments.overrides), arguments.follow
    if any(job.config.cluster.runs_on_every_node for job in jobs):
        from launcher.cli import every_node

        return every_node.train(jobs, arguments.yes)
    for note in dict.fromkeys(job.origins.dropped_note() for job in jobs):
        if note is not None:
            print(f"note: {note}", flush=True)
    plans: list[LaunchPlan] = []
    group = f"sweep-{datetime.now():%Y%m%d-%H%M%S}"
    # All jobs have passed their checks before one starts.
    for composed in jobs:
        tracking = composed.config.tracking
        if len(jobs) > 1 and not tracking.group:
            grouped = {"tracking": tracking.model_copy(update={"group": group})}
            composed = replace(composed, config=composed.config.model_copy(update=grouped))
        with composed.located():
            plans.append(prepare_plan(composed, taken_names={plan.run_name for plan in plans}))
    return start_all(plans, follows) if may_start(plans, arguments.yes) else EXIT_REFUSED


def resume(arguments: argparse.Namespace) -> int:
    """Start the next attempt of a run, which may be in a mirror, and follow it if requested."""
    if "://" in arguments.run:
        from launcher.cli import mirror

        run = mirror.download_run(arguments.run, arguments.root, arguments.step)
    else:
        run = run_store.find_run(arguments.run, arguments.root)
    folders.require_run(run.root)
    plan = run_store.load_plan(run)
    if plan.config.cluster.runs_on_every_node:
        from launcher.cli import every_node

        return every_node.resume(run, plan, arguments)
    cluster = cluster_for(plan.config.cluster.kind)
    with Interrupts() as interrupts:
        with run_store.start_lock(run):
            attempt = resume_run(
                run,
                plan,
                cluster,
                arguments.overrides,
                arguments.step,
                interrupts,
                arguments.force,
                accepts_cost=arguments.yes,
            )
        if arguments.follow if arguments.follow is not None else plan.config.cluster.is_followed:
            return follow(run, attempt, cluster, interrupts)
        show_started(run, cluster.submission_details(run, attempt))
        return interrupted_start(run) if interrupts.received else 0


def start_all(plans: list[LaunchPlan], follows: bool | None) -> int:
    """Show and start each run, and follow it if requested; returns the largest exit code. After Ctrl-C, no further run starts."""
    codes = []
    started: list[tuple[LaunchPlan, Sequence[tuple[str, str]]]] = []
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
                show_started(run_dir, started[-1][1])
                if interrupts.received:
                    codes.append(interrupted_start(run_dir))
        if interrupts.received:
            if rest := [plan.run_name for plan in plans[number:]]:
                print(f"not started: {', '.join(rest)}", flush=True)
            break
    if len(started) > 1:
        shared = set.intersection(*(set(plan.provenance.overrides) for plan, _ in started))
        rows = []
        for plan, details in started:
            own = [override for override in plan.provenance.overrides if override not in shared]
            rows.append((plan.run_name, dict(details).get("job", "-"), " ".join(own)))
        print()
        terminal.show(Table(("run", "job", "settings"), rows))
    return max(codes, default=0)
