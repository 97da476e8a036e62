"""Checks of a Slurm site: before a job is submitted, and for `launcher doctor`.

Before a submission: Slurm accepts the job, can start it, and gives it time to save. Doctor also checks the nodes, in a short
allocation from salloc: nodes answer through srun's connections, so even a node without shared storage can report.
"""

from __future__ import annotations

import math
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launcher.clusters.check_results import NODE_MODULE, OK, WARNING, CheckResult, ReportReader, from_problem
from launcher.clusters.slurm import sbatch, site
from launcher.clusters.slurm.commands import SlurmError, SlurmUnreachable, slurm
from launcher.config.schema import RunConfig
from launcher.config.sections.slurm import SlurmSection
from launcher.data.cache_dir import cache_root
from launcher.errors import LauncherError, Problem, RunError, SubmitError
from launcher.plan.checkpoints import CHECKPOINT_GIB_PER_SECOND, SAVE_MARGIN, save_seconds
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count

# Settings that a message of sbatch may name.
_NAMED_KEYS = {"account": "cluster.account", "partition": "cluster.partition", "qos": "cluster.additional_parameters.qos"}
# Time limit of the checks in minutes, in case this command is killed and cannot cancel them.
_MAX_MINUTES = 15


def check(section: SlurmSection, plan: LaunchPlan) -> None:
    """Reject a job that this site refuses or would never start.

    Raises:
        SubmitError: with all problems, or if Slurm does not answer.
    """
    if shutil.which("sbatch") is None:
        raise SubmitError(
            "sbatch is not on this machine",
            where="cluster=slurm",
            remedy="submit from a login node of the cluster, or train on this machine with cluster=local",
        )
    problems, save_s = [], save_seconds(plan)
    if save_s > section.signal_lead_seconds:
        problem = (
            f"a checkpoint of {plan.checkpoint_bytes / 2**30:.1f} GiB cannot be saved before the time limit: at an assumed "
            f"{CHECKPOINT_GIB_PER_SECOND:g} GiB/s per node, {format_count(plan.topology.nodes, 'node')} need {save_s} s"
        )
        remedy = f"set it to {math.ceil(SAVE_MARGIN * save_s)}, and cluster.time to much more than that"
        problems.append(Problem(problem, "cluster.signal_lead_seconds", str(section.signal_lead_seconds), remedy))
    try:
        num_gpus = plan.topology.ranks_per_node if plan.topology.device == "cuda" else 0
        problems = [*site_problems(plan.config, num_gpus), *problems]
    except (SlurmError, SubmitError) as error:
        raise SubmitError([*error.problems, *problems]) from None
    if problems:
        raise SubmitError(problems)


def site_problems(config: RunConfig, num_gpus: int) -> list[Problem]:
    """Return why this site cannot run a job with these settings; `num_gpus` per node applies if the settings name none.

    Raises:
        SlurmError: if Slurm does not answer.
        SubmitError: if a partition does not exist.
    """
    section = SlurmSection.of(config.cluster)
    partitions = site.chosen_partitions(section)
    # Slurm accepts jobs above a partition's limit by default, and never starts them.
    startable = [one for one in partitions if one.max_minutes is None or section.time_minutes <= one.max_minutes]
    if not startable:
        limits = ", ".join(f"{_format_minutes(one.max_minutes or 0)} in {one.name}" for one in partitions)
        remedy = "set it to that or less; a run that needs longer continues in the next job"
        return [Problem(f"the time limit is {limits}", "cluster.time", section.time, remedy)]
    closed = [one for one in startable if one.state != "UP"]
    if len(closed) == len(startable):
        states = ", ".join(f"{one.name} is {one.state}" for one in closed)
        remedy = "wait until the administrators open it, or use another partition"
        return [Problem("the partition does not start jobs", "cluster.partition", states, remedy)]
    try:
        with sbatch.clean_environment():
            request = sbatch.request_words(config, "launcher-test", num_gpus, section.time_minutes)
            slurm("sbatch", "--test-only", *request, "--wrap", "true")
    except SlurmUnreachable:
        raise
    except SlurmError as error:
        message = error.problems[0].value
        where = next((key for word, key in _NAMED_KEYS.items() if word in message.lower()), "cluster")
        remedy = "; ".join(f"partition {one.name} has {_describe_nodes(one)}" for one in partitions)
        return [Problem("Slurm refuses the job", where, message, remedy)]
    return []


def _describe_nodes(partition: site.Partition) -> str:
    kinds = Counter(str(node) if node.in_service else f"{node}, out of service" for node in partition.nodes)
    return "; ".join(f"{format_count(count, 'node')} with {kind}" for kind, count in kinds.most_common(5)) or "no nodes"


def _format_minutes(minutes: int) -> str:
    days, rest = divmod(minutes, 1440)
    return (f"{days}-" if days else "") + f"{rest // 60:02d}:{rest % 60:02d}:00"


def runs_elsewhere(config: RunConfig) -> bool:
    return True


def check_submission(config: RunConfig) -> list[CheckResult]:
    """Check that Slurm answers, and that its partitions can run the job."""
    try:
        problems = site_problems(config, sbatch.num_gpus_per_node(config))
        partitions = site.chosen_partitions(SlurmSection.of(config.cluster))
    except LauncherError as error:
        problems = list(error.problems)
    if problems:
        return [from_problem(problem, name="Slurm") for problem in problems]
    shown = "; ".join(
        f"{partition.name}: {sum(node.in_service for node in partition.nodes)} of {len(partition.nodes)} nodes in service"
        for partition in partitions
    )
    return [CheckResult("Slurm", OK, f"it answers; {shown}")]


def run_on_nodes(config: RunConfig, environ: Mapping[str, str], deadline: float, reader: ReportReader) -> list[CheckResult]:
    """Allocate the run's nodes and run the checks on each; returns a warning for each failed command of the settings.

    Raises:
        RunError: if Slurm grants no allocation in time, or if nodes did not report.
    """
    section, num_gpus = SlurmSection.of(config.cluster), sbatch.num_gpus_per_node(config)
    name = f"launcher-doctor-{secrets.token_hex(4)}"
    minutes = min(section.time_minutes, _MAX_MINUTES, math.ceil((deadline - time.monotonic()) / 60))
    folders, flags = (Path(config.run.root).absolute(), cache_root()), ("--kill-on-bad-exit=0", "--wait=0")
    script = sbatch.node_script(config, (NODE_MODULE,), num_gpus, environ, folders, flags)
    if num_gpus:
        # Each node checks that it has the GPUs.
        config = config.model_copy(update={"cluster": section.model_copy(update={"ranks_per_node": num_gpus})})
    request = (config, name, config.model_dump_json(), num_gpus, minutes, script, environ)
    with sbatch.allocate(*request) as started:
        started.show_lines(reader.feed, deadline)
        if (num_missing := section.nodes - len(reader.reports)) <= 0:
            remedy = "run it on a node by hand; correct or remove it in the settings"
            seen = "a command of cluster.setup failed: "
            return [
                CheckResult("setup", WARNING, seen + line.removeprefix(sbatch.FAILED_SETUP).strip(), remedy)
                for line in started.errors
                if line.startswith(sbatch.FAILED_SETUP)
            ]
        message = f"{num_missing} of {section.nodes} nodes did not report"
        if time.monotonic() < deadline:
            raise RunError(message, where="salloc, srun", value=sbatch.last_errors(started), remedy=sbatch.ALLOCATION_REMEDY)
        state = ""
        with suppress(SlurmError):
            state = slurm("squeue", "--me", f"--name={name}", "--noheader", "--format=the job is %T (%r)").strip()
        remedy = "give it more time with --timeout, or choose another cluster.partition; squeue --me shows why a job waits"
        raise RunError(f"{message} in time", where=state or "the allocation", remedy=remedy)
