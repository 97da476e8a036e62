"""Slurm for `launcher doctor`: checks the site from here, and the nodes in a short allocation.

The allocation comes from salloc: nodes answer through srun's connections, so even a node without shared storage can report.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from launcher.clusters.check_results import NODE_MODULE, OK, WARNING, CheckResult, ReportReader, from_problem
from launcher.clusters.node_command import NodeCommand, uninterrupted
from launcher.clusters.slurm import allocation, checks, site
from launcher.config.schema import RunConfig
from launcher.config.sections.slurm import SlurmSection
from launcher.data.cache_dir import cache_root
from launcher.errors import LauncherError, RunError

# Time limit of the checks in minutes, in case this command is killed and cannot cancel them.
_MAX_MINUTES = 15


def runs_elsewhere(config: RunConfig) -> bool:
    return True


def check_submission(config: RunConfig) -> list[CheckResult]:
    """Check that Slurm answers, and that its partitions can run the job."""
    section = SlurmSection.of(config.cluster)
    try:
        slurm_site = site.read()
        partitions = slurm_site.chosen(section)
        problems = checks.site_problems(section, allocation.num_gpus_per_node(config))
    except LauncherError as error:
        return [from_problem(problem, name="Slurm") for problem in error.problems]
    if problems:
        return [from_problem(problem, name="Slurm") for problem in problems]
    shown = "; ".join(
        f"{partition.name} ({partition.state.lower()}): {sum(node.in_service for node in partition.nodes)} of "
        f"{len(partition.nodes)} nodes in service, {next(map(str, partition.nodes), 'none')} each"
        for partition in partitions
    )
    return [CheckResult("Slurm", OK, f"cluster {slurm_site.cluster} answers; {shown}")]


def run_on_nodes(config: RunConfig, environ: Mapping[str, str], deadline: float, reader: ReportReader) -> list[CheckResult]:
    """Allocate the run's nodes and run the checks on each; returns a warning for each failed command of the settings.

    Raises:
        RunError: if Slurm grants no allocation in time, or if nodes did not report.
    """
    section, name, num_gpus = (
        SlurmSection.of(config.cluster),
        f"launcher-doctor-{secrets.token_hex(4)}",
        allocation.num_gpus_per_node(config),
    )
    minutes = min(section.time_minutes, _MAX_MINUTES, math.ceil((deadline - time.monotonic()) / 60))
    folders = (Path(config.run.root).absolute(), cache_root())
    flags = ("--kill-on-bad-exit=0", "--wait=0")
    script = allocation.node_script(config, (NODE_MODULE,), num_gpus, environ, folders, flags)
    command = [*allocation.salloc_words(config, name, num_gpus, minutes), "bash", "-c", script]
    if num_gpus:
        # Each node checks that it has the GPUs.
        config = config.model_copy(update={"cluster": section.model_copy(update={"ranks_per_node": num_gpus})})
    started = NodeCommand(command, config.model_dump_json(), {**allocation.outside_of_a_job(), **section.env, **environ})
    try:
        for line in started.lines(deadline):
            reader.feed(line)
        if (num_missing := section.nodes - len(reader.reports)) <= 0:
            return [_failed_command(line) for line in started.errors if line.startswith(allocation.FAILED)]
        if time.monotonic() >= deadline:
            raise RunError(
                f"{num_missing} of {section.nodes} nodes did not report in time",
                where=allocation.queue_state(name),
                value=allocation.last_lines(started),
                remedy="give it more time with --timeout, or choose another cluster.partition; squeue --me shows why a job waits",
            )
        refused = allocation.refusal(started)
        raise RunError(
            f"{num_missing} of {section.nodes} nodes did not report",
            where="salloc, srun",
            value=refused,
            remedy=allocation.remedy(refused),
        )
    finally:
        with uninterrupted():
            started.close()
            allocation.cancel(name)


def _failed_command(line: str) -> CheckResult:
    seen = f"a command of cluster.modules or cluster.setup failed: {line.removeprefix(allocation.FAILED).strip()}"
    return CheckResult("setup", WARNING, seen, "run it on a node by hand; correct or remove it in the settings")
