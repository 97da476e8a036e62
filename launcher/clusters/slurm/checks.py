"""Checks before a job is submitted: Slurm accepts it, can start it, and gives it time to save."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator

from launcher.clusters.slurm import allocation, sbatch, site
from launcher.clusters.slurm.commands import SlurmError, SlurmUnreachable, slurm
from launcher.config.schema import RunConfig
from launcher.config.sections.slurm import SlurmSection
from launcher.errors import Problem, SubmitError
from launcher.plan.checkpoints import CHECKPOINT_GIB_PER_SECOND, SAVE_MARGIN, save_seconds
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count

# Settings that a message of sbatch may name.
_NAMED_KEYS = {"account": "cluster.account", "partition": "cluster.partition", "qos": "cluster.additional_parameters.qos"}


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
    problems = [*_save_time_problems(section, plan)]
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
        limits = ", ".join(f"{_duration(one.max_minutes or 0)} in {one.name}" for one in partitions)
        remedy = "set it to that or less; a run that needs longer continues in the next job"
        return [Problem(f"the time limit is {limits}", "cluster.time", section.time, remedy)]
    closed = [one for one in startable if one.state != "UP"]
    if len(closed) == len(startable):
        states = ", ".join(f"{one.name} is {one.state}" for one in closed)
        remedy = "wait until the administrators open it, or use another partition"
        return [Problem("the partition does not start jobs", "cluster.partition", states, remedy)]
    try:
        with sbatch.clean_environment():
            request = allocation.request_words(config, "launcher-test", num_gpus, section.time_minutes)
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


def _save_time_problems(section: SlurmSection, plan: LaunchPlan) -> Iterator[Problem]:
    size_gib, num_nodes = plan.checkpoint_bytes / 2**30, plan.topology.nodes
    save_s = save_seconds(plan)
    if save_s > section.signal_lead_seconds:
        yield Problem(
            f"a checkpoint of {size_gib:.1f} GiB cannot be saved before the time limit: at an assumed "
            f"{CHECKPOINT_GIB_PER_SECOND:g} GiB/s per node, {format_count(num_nodes, 'node')} need {save_s} s",
            where="cluster.signal_lead_seconds",
            value=str(section.signal_lead_seconds),
            remedy=f"set it to {math.ceil(SAVE_MARGIN * save_s)}, and cluster.time to much more than that",
        )


def _duration(minutes: int) -> str:
    days, rest = divmod(minutes, 1440)
    return (f"{days}-" if days else "") + f"{rest // 60:02d}:{rest % 60:02d}:00"
