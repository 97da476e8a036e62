"""Slurm as `launcher evaluate` sees it: the prompts are answered in an allocation with the run's cluster settings."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from launcher.clusters.node_command import NodeCommand, show_lines, uninterrupted
from launcher.clusters.slurm import allocation
from launcher.config.schema import RunConfig
from launcher.config.sections.slurm import SlurmSection
from launcher.data.cache_dir import cache_root
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir
from launcher.security import trust

_MODULE = "launcher.worker.slurm.evaluation_node"
_LONGEST_WAIT_S = 30 * 24 * 3600.0


def runs_elsewhere(config: RunConfig) -> bool:
    return True


def run_on_nodes(config: RunConfig, run: RunDir, folder: Path) -> None:
    """Allocate the run's nodes, and run the processes of the evaluation on each.

    Raises:
        RunError: if Slurm grants no allocation, or a process has failed.
    """
    section, name = SlurmSection.of(config.cluster), f"launcher-evaluate-{secrets.token_hex(4)}"
    num_gpus = allocation.num_gpus_per_node(config)
    module = (_MODULE, str(folder), str(num_gpus))
    folders = (run.root, cache_root(), *_model_folders(folder))
    # Nodes may not know the names of users.
    owners = {trust.VARIABLE: trust.Trust.from_environ(os.environ).as_numbers()}
    script = allocation.node_script(config, module, num_gpus, owners, folders, ("--kill-on-bad-exit=1",))
    command = [*allocation.salloc_words(config, name, num_gpus, section.time_minutes), "bash", "-c", script]
    started = NodeCommand(command, "", {**allocation.outside_of_a_job(), **section.env})
    try:
        lines = show_lines(started, time.monotonic() + _LONGEST_WAIT_S)
        if not (folder / "answers.json").is_file():
            refused = allocation.refusal(started)
            raise RunError(
                "the nodes have not answered all prompts",
                where="salloc, srun",
                value=" / ".join([refused, *lines[-2:]] if refused else lines[-3:]),
                remedy=f"start the same command again, it continues; {allocation.remedy(refused)}",
            )
    finally:
        with uninterrupted():
            started.close()
            allocation.cancel(name)


def _model_folders(folder: Path) -> list[Path]:
    import json

    task = json.loads((folder / "task.json").read_bytes())
    models = [task["tuned"], *([task["base"]] if task["base"] else [])]
    return [Path(path) for path in (*(model["folder"] for model in models), task["tokenizer"])]
