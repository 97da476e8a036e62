"""Slurm for `launcher doctor`: checks the site from here, and the nodes in a short allocation.

The allocation comes from salloc: nodes answer through srun's connections, so even a node without shared storage can report.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launcher.clusters.check_results import NODE_MODULE, OK, WARNING, CheckResult, ReportReader, from_problem
from launcher.clusters.slurm import allocation, checks, site
from launcher.clusters.slurm.commands import SlurmError, slurm
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
    try:
        problems = checks.site_problems(config, allocation.num_gpus_per_node(config))
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
    section, num_gpus = SlurmSection.of(config.cluster), allocation.num_gpus_per_node(config)
    name = f"launcher-doctor-{secrets.token_hex(4)}"
    minutes = min(section.time_minutes, _MAX_MINUTES, math.ceil((deadline - time.monotonic()) / 60))
    folders, flags = (Path(config.run.root).absolute(), cache_root()), ("--kill-on-bad-exit=0", "--wait=0")
    script = allocation.node_script(config, (NODE_MODULE,), num_gpus, environ, folders, flags)
    if num_gpus:
        # Each node checks that it has the GPUs.
        config = config.model_copy(update={"cluster": section.model_copy(update={"ranks_per_node": num_gpus})})
    request = (config, name, config.model_dump_json(), num_gpus, minutes, script, environ)
    with allocation.allocate(*request) as started:
        started.show_lines(reader.feed, deadline)
        if (num_missing := section.nodes - len(reader.reports)) <= 0:
            remedy = "run it on a node by hand; correct or remove it in the settings"
            seen = "a command of cluster.setup failed: "
            return [
                CheckResult("setup", WARNING, seen + line.removeprefix(allocation.FAILED).strip(), remedy)
                for line in started.errors
                if line.startswith(allocation.FAILED)
            ]
        message = f"{num_missing} of {section.nodes} nodes did not report"
        if time.monotonic() < deadline:
            raise RunError(message, where="salloc, srun", value=allocation.last_errors(started), remedy=allocation.REMEDY)
        state = ""
        with suppress(SlurmError):
            state = slurm("squeue", "--me", f"--name={name}", "--noheader", "--format=the job is %T (%r)").strip()
        remedy = "give it more time with --timeout, or choose another cluster.partition; squeue --me shows why a job waits"
        raise RunError(f"{message} in time", where=state or "the allocation", remedy=remedy)
