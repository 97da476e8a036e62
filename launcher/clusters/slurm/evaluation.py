"""Slurm for `launcher evaluate`: prompts are answered in an allocation with the run's cluster settings.

During training, each evaluation of a checkpoint is a one-node batch job, which can outlive the run's own job.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.clusters.node_command import show_line
from launcher.clusters.slurm import sbatch
from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.config.schema import RunConfig
from launcher.config.sections.slurm import SlurmSection
from launcher.data.cache_dir import cache_root
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir
from launcher.security import owners
from launcher.security.folders import private_files

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan

SUBMITS_JOBS = True
_MODULE = "launcher.worker.slurm.evaluation_node"
_LONGEST_WAIT_S = 30 * 24 * 3600.0
# How long to retry calls to a silent controller.
_PATIENCE_S = 20.0


def runs_elsewhere(config: RunConfig) -> bool:
    return True


def run_on_nodes(config: RunConfig, run: RunDir, folder: Path) -> None:
    """Allocate the run's nodes, and run the evaluation's processes on each.

    Raises:
        RunError: if Slurm grants no allocation, or a process has failed.
    """
    section, name = SlurmSection.of(config.cluster), f"launcher-evaluate-{secrets.token_hex(4)}"
    num_gpus = sbatch.num_gpus_per_node(config)
    module = (_MODULE, str(folder), str(num_gpus))
    task = json.loads((folder / "task.json").read_bytes())
    models = [task["tuned"], *([task["base"]] if task["base"] else [])]
    folders = (run.root, cache_root(), *(Path(model["folder"]) for model in models), Path(task["tokenizer"]))
    # Nodes may not know user names.
    trusted = {owners.VARIABLE: owners.Trust.from_environ(os.environ).as_numbers()}
    script = sbatch.node_script(config, module, num_gpus, trusted, folders, ("--kill-on-bad-exit=1",))
    with sbatch.allocate(config, name, "", num_gpus, section.time_minutes, script, {}) as started:
        lines = started.show_lines(show_line, time.monotonic() + _LONGEST_WAIT_S)
        if not (folder / "answers.json").is_file():
            raise RunError(
                "the nodes have not answered all prompts",
                where="salloc, srun",
                value=" / ".join([*lines[-2:], sbatch.last_errors(started)]),
                remedy=f"start the same command again, it continues; or {sbatch.ALLOCATION_REMEDY}",
            )


def submit_job(plan: LaunchPlan, run: RunDir, step: int) -> str:
    """Submit a one-node job that evaluates a step; returns its number. A run's jobs start one after another.

    Raises:
        SubmitError: for a path that a batch script cannot contain.
        SlurmError: if this machine has no sbatch, or Slurm refuses the job.
    """
    section = SlurmSection.of(plan.config.cluster)
    config = plan.config.model_copy(update={"cluster": section.model_copy(update={"nodes": 1})})
    num_gpus = plan.topology.ranks_per_node if plan.topology.device == "cuda" else 0
    words = ("evaluate", sbatch.plain_path(str(run.root)), "--step", str(step), "--here")
    trusted = {owners.VARIABLE: owners.Trust.from_environ(os.environ).as_numbers()}
    folders = [Path(folder) for folder in (*sbatch.needed_folders(plan), str(cache_root()))]
    task = sbatch.node_script(config, ("launcher", *words), num_gpus, trusted, folders, ())
    folder = run.evaluation(step)
    with private_files():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        script = folder / "job.sh"
        # The run's own job sets OMP_NUM_THREADS to divide a node's cores over its ranks.
        script.write_text("\n".join(["#!/bin/bash", "umask 077", "unset OMP_NUM_THREADS", task, ""]))
    request = sbatch.request_words(config, _job_name(plan), num_gpus, section.time_minutes)
    # Jobs with the same name and user wait for each other, so the base model is asked only once.
    options = ("--parsable", "--dependency=singleton", f"--chdir={run.root}", f"--output={folder}/job-%j.log")
    with sbatch.clean_environment():
        answer = slurm("sbatch", *options, *request, str(script), retry_s=_PATIENCE_S)
    # The cluster's name may follow the number.
    return answer.strip().partition(";")[0]


def cancel_jobs(plan: LaunchPlan) -> None:
    """Cancel the run's jobs; if Slurm does not answer, they continue."""
    with suppress(SlurmError):
        slurm("scancel", "--me", f"--name={_job_name(plan)}")


def _job_name(plan: LaunchPlan) -> str:
    return f"launcher-answers-{plan.wandb_id}"
