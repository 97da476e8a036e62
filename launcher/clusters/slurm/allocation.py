"""A short allocation for a command: salloc starts a task on each node; its output comes back through srun's connections."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import launcher
from launcher.clusters.node_command import NodeCommand, uninterrupted
from launcher.clusters.preflight import existing_folder
from launcher.clusters.slurm import sbatch, site
from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.config.schema import RunConfig
from launcher.config.sections.slurm import SlurmSection

REMEDY = (
    "try the same request by hand: salloc --nodes=1 srun true; the launcher and its environment must be on storage that all "
    "nodes share, under the same path"
)
# Prefix of the line that reports a failed command of cluster.setup.
FAILED = "launcher-setup: this command failed: "
_CANCEL_PATIENCE_S = 10.0
# Options of a run's job that do not belong to a short allocation beside it.
_OF_RUNS = frozenset({"array", "begin", "deadline", "dependency", "mail-type", "mail-user", "mail_type", "mail_user"})


def num_gpus_per_node(config: RunConfig) -> int:
    """Return how many GPUs per node a run with these settings uses; 0 for a run on CPUs."""
    section = SlurmSection.of(config.cluster)
    device = site.gpus_of(section)
    return (section.ranks_per_node or device.count) if device.kind == "cuda" else 0


@contextmanager
def allocate(
    config: RunConfig, name: str, stdin: str, num_gpus: int, minutes: int, script: str, environ: Mapping[str, str]
) -> Iterator[NodeCommand]:
    """Start salloc with `script`, which reads `stdin`; cancel the job `name` at the end.

    Variables that describe another job, or change salloc's options, are left out of the environment.
    """
    dropped = ("SALLOC_", "SLURM_", "SLURMD_", "SRUN_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(dropped) or name == "SLURM_CONF"}
    command = ["salloc", *request_words(config, name, num_gpus, minutes), "bash", "-c", script]
    try:
        with NodeCommand(command, stdin, {**own, **SlurmSection.of(config.cluster).env, **environ}) as started:
            yield started
    finally:
        # By name, which works even if salloc ended before it knew the job's number.
        with uninterrupted(), suppress(SlurmError):
            slurm("scancel", "--me", f"--name={name}", retry_s=_CANCEL_PATIENCE_S)


def request_words(config: RunConfig, name: str, num_gpus: int, minutes: int) -> list[str]:
    """Return the arguments of salloc or sbatch for the job's name and its request."""
    section = SlurmSection.of(config.cluster)
    requested = sbatch.requested_nodes(section, section.nodes, num_gpus)
    additional = {key: value or True for key, value in section.additional_parameters.items() if key not in _OF_RUNS}
    options = {"job-name": name, "time": str(minutes), **requested, **additional}
    return [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in options.items()
        if value is not None
    ]


def node_script(
    config: RunConfig,
    module: Sequence[str],
    num_gpus: int,
    environ: Mapping[str, str],
    folders: Sequence[Path],
    flags: Sequence[str],
) -> str:
    """Return the script that salloc starts: it runs the settings' commands, and a task on each node.

    `module` is a Python module and its arguments, `flags` are srun's flags, `folders` are the folders that a container needs.
    """
    section = SlurmSection.of(config.cluster)
    mounted = [*(str(existing_folder(folder)) for folder in folders), _package_folder()]
    task = [
        *("srun", *flags, f"--nodes={section.nodes}", "--ntasks-per-node=1"),
        *([f"--cpus-per-task={section.cpus_per_task}"] if section.cpus_per_task else []),
        *sbatch.task_arguments(section, tuple(environ), mounted),
        *sbatch.python_words(section, num_gpus > 0, mounted),
        *("-u", "-m", *module),
    ]
    # Standard input is for the tasks. As in a run, a failed command does not end the script.
    setup = "\n".join([f"{line} || echo {shlex.quote(FAILED + line)}" for line in sbatch.setup_commands(section)] or [":"])
    variables = {"PYTHONSAFEPATH": "1", **section.env, **environ}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    path = f'export PYTHONPATH={shlex.quote(_package_folder())}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    return "\n".join(["{", setup, "} </dev/null >&2", "set +e", *exports, path, f"exec {shlex.join(task)}"])


def last_errors(command: NodeCommand) -> str:
    """Return the last messages of salloc, srun and Python."""
    return " / ".join([line.strip() for line in command.errors if line.strip()][-4:])


def _package_folder() -> str:
    return str(Path(launcher.__file__).resolve().parents[1])
