"""What a site's nodes do beside runs: `launcher doctor` checks them, and for `launcher evaluate` they answer prompts.

Both wait for a short allocation. srun's connections return a task's output, so a node without shared storage can report, too.
During training, each evaluation of a checkpoint is a one-node batch job instead, which can outlive the run's own job.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import launcher
from launcher.clusters.check_results import NODE_MODULE, OK, WARNING, CheckResult, ReportReader, from_problem
from launcher.clusters.node_command import NodeCommand, show_line, uninterrupted
from launcher.clusters.preflight import existing_folder
from launcher.clusters.slurm import sbatch, site
from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.config.schema import RunConfig
from launcher.config.sections.slurm import SlurmSection
from launcher.data.cache_dir import cache_root
from launcher.errors import LauncherError, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.security import folders
from launcher.security.folders import private_files

SUBMITS_JOBS = True
# Time limit of doctor's checks in minutes, in case the command is killed and cannot cancel them.
_MAX_MINUTES = 15
_LONGEST_WAIT_S = 30 * 24 * 3600.0
# How long to retry calls to a silent controller.
_SUBMIT_PATIENCE_S, _CANCEL_PATIENCE_S = 20.0, 10.0
_REMEDY = (
    "try the same request by hand: salloc --nodes=1 srun true; the launcher and its environment must be on storage that all "
    "nodes share, under the same path"
)
# Prefix of the line that reports a failed command of cluster.setup.
_FAILED_SETUP = "launcher-setup: this command failed: "
_PACKAGE_FOLDER = str(Path(launcher.__file__).resolve().parents[1])


def runs_elsewhere(config: RunConfig) -> bool:
    return True


def check_submission(config: RunConfig) -> list[CheckResult]:
    """Check that Slurm answers, and that its partitions can run the job."""
    try:
        problems = site.find_site_problems(config, site.num_gpus_per_node(config))
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


def check_nodes(config: RunConfig, environ: Mapping[str, str], deadline: float, reader: ReportReader) -> list[CheckResult]:
    """Allocate the run's nodes and run the checks on each; returns a warning for each failed command of the settings."""
    section, num_gpus = SlurmSection.of(config.cluster), site.num_gpus_per_node(config)
    name = f"launcher-doctor-{secrets.token_hex(4)}"
    minutes = min(section.time_minutes, _MAX_MINUTES, math.ceil((deadline - time.monotonic()) / 60))
    folders, flags = (Path(config.run.root).absolute(), cache_root()), ("--kill-on-bad-exit=0", "--wait=0")
    script = _render_script(config, (NODE_MODULE,), num_gpus, environ, folders, flags)
    if num_gpus:
        # Each node checks that it has the GPUs.
        config = config.model_copy(update={"cluster": section.model_copy(update={"ranks_per_node": num_gpus})})
    with _allocate(config, name, num_gpus, minutes, script, environ, config.model_dump_json()) as started:
        started.show_lines(reader.feed, deadline)
        if (num_missing := section.nodes - len(reader.reports)) <= 0:
            remedy = "run it on a node by hand; correct or remove it in the settings"
            seen = "a command of cluster.setup failed: "
            return [
                CheckResult("setup", WARNING, seen + line.removeprefix(_FAILED_SETUP).strip(), remedy)
                for line in started.errors
                if line.startswith(_FAILED_SETUP)
            ]
        message = f"{num_missing} of {section.nodes} nodes did not report"
        if time.monotonic() < deadline:
            raise RunError(message, where="salloc, srun", value=_join_last_errors(started), remedy=_REMEDY)
        state = ""
        with suppress(SlurmError):
            state = slurm("squeue", "--me", f"--name={name}", "--noheader", "--format=the job is %T (%r)").strip()
        remedy = "give it more time with --timeout, or choose another cluster.partition; squeue --me shows why a job waits"
        raise RunError(f"{message} in time", where=state or "the allocation", remedy=remedy)


def answer_prompts(config: RunConfig, run: RunDir, folder: Path) -> None:
    """Allocate the run's nodes, and run the evaluation's processes on each."""
    section, num_gpus = SlurmSection.of(config.cluster), site.num_gpus_per_node(config)
    module = ("launcher.worker.slurm.agent", "evaluate", str(folder), str(num_gpus))
    task = json.loads((folder / "task.json").read_bytes())
    models = [task["tuned"], *([task["base"]] if task["base"] else [])]
    folders = (run.root, cache_root(), *(Path(model["folder"]) for model in models), Path(task["tokenizer"]))
    script = _render_script(config, module, num_gpus, _trusted_owners(), folders, ("--kill-on-bad-exit=1",))
    name = f"launcher-evaluate-{secrets.token_hex(4)}"
    with _allocate(config, name, num_gpus, section.time_minutes, script) as started:
        lines = started.show_lines(show_line, time.monotonic() + _LONGEST_WAIT_S)
        if not (folder / "answers.json").is_file():
            raise RunError(
                "the nodes have not answered all prompts",
                where="salloc, srun",
                value=" / ".join([*lines[-2:], _join_last_errors(started)]),
                remedy=f"start the same command again, it continues; or {_REMEDY}",
            )


def submit_job(plan: LaunchPlan, run: RunDir, step: int) -> str:
    """Submit a one-node job that evaluates a step; returns its number. A run's jobs start one after another."""
    section = SlurmSection.of(plan.config.cluster)
    config = plan.config.model_copy(update={"cluster": section.model_copy(update={"nodes": 1})})
    num_gpus = plan.topology.ranks_per_node if plan.topology.device == "cuda" else 0
    words = ("evaluate", sbatch.plain_path(str(run.root)), "--step", str(step), "--here")
    folders = [Path(folder) for folder in (*sbatch.needed_folders(plan), str(cache_root()))]
    task = _render_script(config, ("launcher", *words), num_gpus, _trusted_owners(), folders, ())
    folder = run.evaluation(step)
    with private_files():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        script = folder / "job.sh"
        # The run's own job sets OMP_NUM_THREADS to divide a node's cores over its ranks.
        script.write_text("\n".join(["#!/bin/bash", "umask 077", "unset OMP_NUM_THREADS", task, ""]))
    request = sbatch.request_words(config, _name_jobs(plan), num_gpus, section.time_minutes)
    # Jobs with the same name and user wait for each other, so the base model is asked only once.
    options = ("--parsable", "--dependency=singleton", f"--chdir={run.root}", f"--output={folder}/job-%j.log")
    with sbatch.clean_environment():
        answer = slurm("sbatch", *options, *request, str(script), retry_s=_SUBMIT_PATIENCE_S)
    # The cluster's name may follow the number.
    return answer.strip().partition(";")[0]


def cancel_jobs(plan: LaunchPlan) -> None:
    """Cancel the run's jobs; if Slurm does not answer, they continue."""
    with suppress(SlurmError):
        slurm("scancel", "--me", f"--name={_name_jobs(plan)}")


def _name_jobs(plan: LaunchPlan) -> str:
    return f"launcher-answers-{plan.wandb_id}"


def _trusted_owners() -> dict[str, str]:
    # Nodes may not know user names.
    return {folders.TRUST_VARIABLE: folders.Trust.from_environ(os.environ).as_numbers()}


@contextmanager
def _allocate(
    config: RunConfig,
    name: str,
    num_gpus: int,
    minutes: int,
    script: str,
    environ: Mapping[str, str] | None = None,
    stdin: str = "",
) -> Iterator[NodeCommand]:
    """Start salloc with `script`, which reads `stdin`; cancel the job `name` at the end.

    Variables that describe another job, or change salloc's options, are left out of the environment.
    """
    dropped = ("SALLOC_", "SLURM_", "SLURMD_", "SRUN_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(dropped) or name == "SLURM_CONF"}
    command = ["salloc", *sbatch.request_words(config, name, num_gpus, minutes), "bash", "-c", script]
    try:
        with NodeCommand(command, stdin, {**own, **SlurmSection.of(config.cluster).env, **(environ or {})}) as started:
            yield started
    finally:
        # By name, which works even if salloc ended before it knew the job's number.
        with uninterrupted(), suppress(SlurmError):
            slurm("scancel", "--me", f"--name={name}", retry_s=_CANCEL_PATIENCE_S)


def _render_script(
    config: RunConfig,
    module: Sequence[str],
    num_gpus: int,
    environ: Mapping[str, str],
    folders: Sequence[Path],
    flags: Sequence[str],
) -> str:
    """Return a script that runs the settings' commands, and a task on each node.

    `module` is a Python module and its arguments, `flags` are srun's flags, `folders` are the folders that a container needs.
    """
    section = SlurmSection.of(config.cluster)
    mounted = [*(str(existing_folder(folder)) for folder in folders), _PACKAGE_FOLDER]
    task = [
        *("srun", *flags, f"--nodes={section.nodes}", "--ntasks-per-node=1"),
        *([f"--cpus-per-task={section.cpus_per_task}"] if section.cpus_per_task else []),
        *sbatch.task_arguments(section, tuple(environ), mounted),
        *sbatch.python_words(section, num_gpus > 0, mounted),
        *("-u", "-m", *module),
    ]
    # Standard input is for the tasks. As in a run, a failed command does not end the script.
    setup = "\n".join([f"{line} || echo {shlex.quote(_FAILED_SETUP + line)}" for line in sbatch.setup_commands(section)] or [":"])
    variables = {"PYTHONSAFEPATH": "1", **section.env, **environ}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    path = f'export PYTHONPATH={shlex.quote(_PACKAGE_FOLDER)}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    return "\n".join(["{", setup, "} </dev/null >&2", "set +e", *exports, path, f"exec {shlex.join(task)}"])


def _join_last_errors(command: NodeCommand) -> str:
    """Return the last messages of salloc, srun and Python."""
    return " / ".join([line.strip() for line in command.errors if line.strip()][-4:])
