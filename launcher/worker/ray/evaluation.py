"""The driver of `launcher evaluate` on Ray: `python -m launcher.worker.ray.evaluation FOLDER`.

Starts a task for each free GPU, up to the run's number of workers, or for each node if there are no GPUs. A task runs
launcher.evaluate.answers; if one task fails, the others are ended.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import launcher
from launcher.clusters.detached_process import build_pythonpath
from launcher.config.sections.ray import RaySection
from launcher.errors import EXIT_FAILED
from launcher.evaluate.evaluation_folder import EvaluationFolder
from launcher.security.folders import private_variables
from launcher.security.owners import VARIABLE, Trust
from launcher.worker.ray.connection import join

# Seconds after which free GPUs are counted again. Ray's count may be old: another reservation may have just been made.
_RECOUNT_S = 5


def answer_here(folder: str, rank: int, num_processes: int, num_gpus: int) -> int:
    """Run one process of the evaluation on this node; returns its exit code."""
    import os
    import subprocess
    import sys

    words = [folder, *map(str, (rank, num_processes, num_gpus))]
    command = [sys.executable, "-P", "-u", "-m", "launcher.evaluate.answers", *words]
    environ = {**os.environ, **private_variables(os.environ)}
    return subprocess.run(command, stdin=subprocess.DEVNULL, env=environ).returncode


def main(folder: str) -> int:
    settings = EvaluationFolder(Path(folder)).read_task().settings
    section = RaySection.of(settings.cluster)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    path = build_pythonpath(Path(launcher.__file__).resolve().parents[1], os.environ)
    variables = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", **section.env}
    # Tasks check the run, possibly as another user, on nodes that may not know user names.
    variables[VARIABLE] = Trust.from_environ(os.environ).as_numbers()
    join(section, variables, log_to_driver=True, logging_level="WARNING")
    try:
        num_workers = section.nodes * section.ranks_per_node if section.ranks_per_node else None
        options = task_options(ray, num_workers, section.placement_minutes * 60, settings.evaluate.vllm_gpus)
        if not options:
            message = f"the cluster has not provided a GPU for every process within {section.placement_minutes:g} minutes"
            print(f"{message} (cluster.placement_minutes); see: ray status", flush=True)
            return EXIT_FAILED
        waiting = [
            ray.remote(answer_here).options(**one).remote(folder, rank, len(options), one.get("num_gpus", 0))
            for rank, one in enumerate(options)
        ]
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            if code := ray.get(done):
                return int(code)
        return 0
    finally:
        # Ends the remaining tasks and their processes.
        ray.shutdown()


def task_options(ray: Any, num_workers: int | None, wait_s: float, gpus_per_task: int = 1) -> list[dict[str, Any]]:
    """Return the options of each task: one per free GPU, which is reserved, or one per node if the cluster has no GPUs.

    The list is empty if the GPUs are not free after `wait_s`: other work on the cluster may take them first.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

    if ray.cluster_resources().get("GPU"):
        if (group := _reserve_gpus(ray, num_workers, wait_s, gpus_per_task)) is None:
            return []
        return [
            {
                "num_cpus": 1,
                "num_gpus": gpus_per_task,
                "max_retries": 0,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            }
            for index in range(group.bundle_count)
        ]
    nodes = [node for node in ray.nodes() if node["Alive"]]
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    return [{"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy} for strategy in strategies]


def _reserve_gpus(ray: Any, num_workers: int | None, wait_s: float, gpus_per_task: int) -> Any:
    """Reserve the free GPUs, for at most `num_workers` tasks; returns the placement group, or None if none is ready in time."""
    from ray.util.placement_group import placement_group, remove_placement_group

    until = time.monotonic() + wait_s
    while True:
        num_free = int(ray.available_resources().get("GPU", 0))
        bundle = {"CPU": 1, "GPU": gpus_per_task}
        group = placement_group([bundle] * max(1, min(num_free, num_workers or num_free) // gpus_per_task))
        # Ray counts whole seconds.
        if group.wait(min(_RECOUNT_S, math.ceil(max(0.0, until - time.monotonic())))):
            return group
        remove_placement_group(group)
        if time.monotonic() >= until:
            return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
