"""Slurm as `launcher doctor` sees it: the site from here, and the nodes from a short allocation.

The allocation is salloc's: its nodes answer through srun's connections, so that a node is heard that sees no shared storage.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import launcher
from launcher.clusters.check_results import NODE_MODULE, OK, WARNING, CheckResult, ReportReader, from_problem
from launcher.clusters.node_command import NodeCommand, uninterrupted
from launcher.clusters.slurm import checks, sbatch, site
from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.clusters.storage import existing_folder
from launcher.config.schema import RunConfig
from launcher.config.sections.slurm import SlurmSection
from launcher.data.cache_dir import cache_root
from launcher.errors import LauncherError, RunError

# Minutes that Slurm gives the checks once they run, if this command was killed and cannot cancel them.
_MAX_MINUTES = 15
_CANCEL_PATIENCE_S = 10.0
_FAILED = "launcher-doctor: this command failed: "
# What salloc reports where all is well.
_PROGRESS = re.compile(
    r"salloc: (Granted|Pending|job \d+ (queued|has been)|Nodes .* are ready|Waiting|Relinquish)", re.IGNORECASE
)


def runs_elsewhere(config: RunConfig) -> bool:
    return True


def check_submission(config: RunConfig) -> list[CheckResult]:
    """Check that Slurm answers, and that its partitions can run the job."""
    section = SlurmSection.of(config.cluster)
    try:
        slurm_site = site.read()
        partitions = slurm_site.chosen(section)
        problems = checks.site_problems(section, _num_gpus(config))
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
    """Allocate the run's nodes and run the checks on each; returns a warning for each command of the settings that failed.

    Raises:
        RunError: if Slurm grants no allocation in time, or nodes have not reported.
    """
    section, name, num_gpus = SlurmSection.of(config.cluster), f"launcher-doctor-{secrets.token_hex(4)}", _num_gpus(config)
    command = ["salloc", *_allocation(config, name, num_gpus, deadline), "bash", "-c", _script(config, num_gpus, environ)]
    if num_gpus:
        # Each node checks that it has them.
        config = config.model_copy(update={"cluster": section.model_copy(update={"ranks_per_node": num_gpus})})
    started = NodeCommand(command, config.model_dump_json(), {**_outside_of_a_job(), **section.env, **environ})
    try:
        for line in started.lines(deadline):
            reader.feed(line)
        if (num_missing := section.nodes - len(reader.reports)) <= 0:
            return [_failed_command(line) for line in started.errors if line.startswith(_FAILED)]
        if time.monotonic() >= deadline:
            raise RunError(
                f"{num_missing} of {section.nodes} nodes did not report in time",
                where=_queue_state(name),
                value=_last_lines(started),
                remedy="give it more time with --timeout, or choose another cluster.partition; squeue --me shows why a job waits",
            )
        refusal = _refusal(started)
        raise RunError(
            f"{num_missing} of {section.nodes} nodes did not report", where="salloc, srun", value=refusal, remedy=_remedy(refusal)
        )
    finally:
        with uninterrupted():
            started.close()
            _cancel(name)


def _failed_command(line: str) -> CheckResult:
    seen = f"a command of cluster.modules or cluster.setup failed: {line.removeprefix(_FAILED).strip()}"
    return CheckResult("setup", WARNING, seen, "run it on a node by hand; correct or remove it in the settings")


def _num_gpus(config: RunConfig) -> int:
    section = SlurmSection.of(config.cluster)
    device = site.gpus_of(section)
    return (section.ranks_per_node or device.count) if device.kind == "cuda" else 0


def _allocation(config: RunConfig, name: str, num_gpus: int, deadline: float) -> list[str]:
    """Return salloc's arguments."""
    section = SlurmSection.of(config.cluster)
    minutes = min(section.time_minutes, _MAX_MINUTES, math.ceil((deadline - time.monotonic()) / 60))
    requested = sbatch.requested_nodes(section, section.nodes, num_gpus)
    options = {"job-name": name, "time": str(minutes), "reservation": section.reservation, **requested}
    return [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in options.items()
        if value is not None
    ]


def _script(config: RunConfig, num_gpus: int, environ: Mapping[str, str]) -> str:
    """Return the script that salloc starts: the settings' modules and commands, and a task on each node."""
    section = SlurmSection.of(config.cluster)
    folders = [str(existing_folder(Path(config.run.root).absolute())), str(existing_folder(cache_root())), _package_folder()]
    task = [
        *("srun", "--kill-on-bad-exit=0", "--wait=0", f"--nodes={section.nodes}", "--ntasks-per-node=1"),
        *([f"--cpus-per-task={section.cpus_per_task}"] if section.cpus_per_task else []),
        *sbatch.task_arguments(section, tuple(environ), folders),
        *sbatch.python_words(section, num_gpus > 0, folders),
        *("-u", "-m", NODE_MODULE),
    ]
    # What is read from standard input is for the tasks. A run goes on after a command that fails.
    setup = "\n".join([f"{line} || echo {shlex.quote(_FAILED + line)}" for line in sbatch.setup_commands(section)] or [":"])
    variables = {"PYTHONSAFEPATH": "1", **section.env, **environ}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    path = f'export PYTHONPATH={shlex.quote(_package_folder())}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    return "\n".join(["{", setup, "} </dev/null >&2", "set +e", *exports, path, f"exec {shlex.join(task)}"])


def _package_folder() -> str:
    return str(Path(launcher.__file__).resolve().parents[1])


def _outside_of_a_job() -> dict[str, str]:
    """Return the environment without variables that describe another job or change salloc's options."""
    dropped = ("SALLOC_", "SLURM_", "SLURMD_", "SRUN_")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped) or name == "SLURM_CONF"}


def _last_lines(command: NodeCommand) -> str:
    return " / ".join(line.strip() for line in list(command.errors)[-3:] if line.strip())


def _refusal(command: NodeCommand) -> str:
    """Return what salloc, srun or Python complained about; empty where they only reported their progress."""
    lines = [line.strip() for line in command.errors if line.strip() and not _PROGRESS.match(line)]
    # Python ends with the exception; Slurm's lines name what failed.
    important = [line for line in lines if line.startswith(("salloc: error", "srun: error", "slurmstepd"))] or lines[-2:]
    return " / ".join(dict.fromkeys(important[-4:]))


def _remedy(refusal: str) -> str:
    if "No module named" in refusal or "execve" in refusal or "No such file" in refusal:
        return "install the launcher and its environment on storage that all nodes share, under the same path"
    return "check cluster.partition, account, qos and time; the same request with: salloc --nodes=1 true"


def _queue_state(name: str) -> str:
    """Return Slurm's state and reason of the job, for the message."""
    with suppress(SlurmError):
        state = slurm("squeue", "--me", f"--name={name}", "--noheader", "--format=%T (%r)").strip()
        if state:
            return f"the job is {state}"
    return "the allocation"


def _cancel(name: str) -> None:
    """Cancel the job by its name, also where salloc ended before it knew its number."""
    with suppress(SlurmError):
        slurm("scancel", "--me", f"--name={name}", retry_s=_CANCEL_PATIENCE_S)
