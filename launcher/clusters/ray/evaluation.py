"""Ray for `launcher evaluate`: a driver's tasks, one for each GPU, answer the prompts."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.clusters.node_command import show_line
from launcher.clusters.ray import jobs
from launcher.clusters.ray.cluster import require_usable
from launcher.config.schema import RunConfig
from launcher.config.sections.ray import RaySection
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir

SUBMITS_JOBS = False
_MODULE = "launcher.worker.ray.evaluation"
_LONGEST_WAIT_S = 30 * 24 * 3600.0


def runs_elsewhere(config: RunConfig) -> bool:
    return RaySection.of(config.cluster).address is not None


def run_on_nodes(config: RunConfig, run: RunDir, folder: Path) -> None:
    """Run the evaluation's processes as tasks on the cluster.

    Raises:
        SubmitError: if the cluster does not answer.
        RunError: if a process has failed.
    """
    section = RaySection.of(config.cluster)
    require_usable(section)
    until = time.monotonic() + _LONGEST_WAIT_S
    lines = jobs.run_driver(section, "evaluate", _MODULE, [str(folder)], {}, until, show_line)
    if not (folder / "answers.json").is_file():
        raise RunError(
            "the nodes of the cluster have not answered all prompts",
            where=section.address or "",
            value=" / ".join(lines[-3:]),
            remedy="start the same command again, it continues; look at the cluster with: ray status",
        )
