"""The driver of tasks on the nodes of a Ray cluster, for `launcher evaluate` and `launcher doctor`.

`python -m launcher.worker.ray.node_tasks answer FOLDER` starts a task for each free GPU, up to the run's number of workers, or
for each node if there are no GPUs. A task runs launcher.evaluate.answers; if one task fails, the others are ended.

`python -m launcher.worker.ray.node_tasks check SECONDS` runs launcher.worker.checks.node_check as a task on every node, with all
of its GPUs, and prints the reports. If other work holds a node's GPUs, the driver reports this instead of waiting.
"""

from __future__ import annotations

import base64
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import launcher
from launcher.clusters.check_results import FAILURE, WARNING, CheckResult, MachineReport, to_lines
from launcher.clusters.ray.nodes import REQUEST_VARIABLE
from launcher.config.schema import RunConfig
from launcher.config.sections.ray import RaySection
from launcher.errors import EXIT_FAILED
from launcher.evaluate.evaluation_folder import EvaluationFolder
from launcher.security.folders import TRUST_VARIABLE, Trust, private_variables
from launcher.worker.ray import connection

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_CODE = Path(launcher.__file__).resolve().parents[1]
# Seconds after which free GPUs are counted again. Ray's count may be old: another reservation may have just been made.
_RECOUNT_S = 5


def answer_prompts(folder: str) -> int:
    """Run the processes of an evaluation; returns the exit code of the first that failed, or 0."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    settings = EvaluationFolder(Path(folder)).read_task().settings
    section = RaySection.of(settings.cluster)
    # Tasks check the run, possibly as another user, on nodes that may not know user names.
    trusted = {TRUST_VARIABLE: Trust.from_environ(os.environ).as_numbers()}
    connection.join(section, _CODE, {**section.env, **trusted}, logging_level="WARNING")
    try:
        num_workers = section.nodes * section.ranks_per_node if section.ranks_per_node else None
        group = reserve_gpus(num_workers, section.placement_minutes * 60, settings.evaluate.vllm_gpus)
        if group is None:
            message = f"the cluster has not provided a GPU for every process within {section.placement_minutes:g} minutes"
            print(f"{message} (cluster.placement_minutes); see: ray status", flush=True)
            return EXIT_FAILED
        waiting = [
            ray.remote(answer_here)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            )
            .remote(folder, rank, group.bundle_count, int(bundle.get("GPU", 0)))
            for rank, bundle in enumerate(group.bundle_specs)
        ]
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            if code := ray.get(done):
                return int(code)
        return 0
    finally:
        # Ends the remaining tasks and their processes.
        ray.shutdown()


def reserve_gpus(num_workers: int | None, wait_s: float, gpus_per_task: int = 1) -> PlacementGroup | None:
    """Reserve up to `num_workers` free GPUs, or a CPU of each node without GPUs; None if they are not free after `wait_s`."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    until = time.monotonic() + wait_s
    while True:
        bundles = [{"CPU": 1}] * sum(node["Alive"] for node in ray.nodes())
        if ray.cluster_resources().get("GPU"):
            num_free = int(ray.available_resources().get("GPU", 0))
            num_tasks = min(num_free, num_workers or num_free) // gpus_per_task
            bundles = [{"CPU": 1, "GPU": gpus_per_task}] * max(1, num_tasks)
        group = placement_group(bundles, strategy="SPREAD")
        # Ray counts whole seconds.
        if group.wait(min(_RECOUNT_S, math.ceil(max(0.0, until - time.monotonic())))):
            return group
        remove_placement_group(group)
        if time.monotonic() >= until:
            return None


def answer_here(folder: str, rank: int, num_processes: int, num_gpus: int) -> int:
    """Run one process of the evaluation on this node; returns its exit code."""
    words = [folder, *map(str, (rank, num_processes, num_gpus))]
    command = [sys.executable, "-P", "-u", "-m", "launcher.evaluate.answers", *words]
    environ = {**os.environ, **private_variables(os.environ)}
    return subprocess.run(command, stdin=subprocess.DEVNULL, env=environ).returncode


def check_nodes(request: str, seconds: float) -> None:
    """Print the reports of all nodes; `request` holds the settings and the variables of the checks as JSON."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    until, values = time.monotonic() + seconds, json.loads(request)
    config, environ = RunConfig.model_validate(values["config"]), values["environ"]

    def report(node: str, verdict: str, seen: str, remedy: str) -> None:
        print("\n".join(to_lines(MachineReport(node, (CheckResult("node", verdict, seen, remedy),)))), flush=True)

    connection.join(RaySection.of(config.cluster), _CODE, log_to_driver=False, logging_level="WARNING")
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        tasks = {}
        # Ranks may run on those with GPUs, or on all nodes if none has a GPU.
        for node in [node for node in nodes if node["Resources"].get("GPU")] or nodes:
            name, num_gpus = node["NodeName"], node["Resources"].get("GPU", 0)
            here: dict[str, Any] = {"label_selector": {"ray.io/node-id": node["NodeID"]}}
            if num_gpus:
                group = placement_group([{"GPU": num_gpus}], bundle_label_selector=[here["label_selector"]])
                if not group.wait(_RECOUNT_S):
                    remove_placement_group(group)
                    seen = f"other work of Ray holds some of its {num_gpus:g} GPUs: the node was not checked"
                    report(name, WARNING, seen, "wait until that work has ended, or see: ray status")
                    continue
                here = {"scheduling_strategy": PlacementGroupSchedulingStrategy(group), "num_gpus": num_gpus}
            task = ray.remote(check_here).options(num_cpus=0, max_retries=0, **here)
            tasks[task.remote(config.model_dump_json(), name, environ)] = name
        while tasks and time.monotonic() < until:
            for task in ray.wait([*tasks], timeout=max(0.1, until - time.monotonic()))[0]:
                node = tasks.pop(task)
                try:
                    output = ray.get(task)
                # Ray raises many types of exceptions for a task that could not run.
                except Exception as error:
                    output = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                if "launcher-doctor " in output:
                    print(output, flush=True)
                    continue
                remedy = "install the launcher on the node, under the same path; look at it with: ray status"
                report(node, FAILURE, f"the checks could not run: {output}", remedy)
        for node in tasks.values():
            report(node, FAILURE, f"no answer within {seconds:.0f} s", "look at the node with: ray status")
    finally:
        ray.shutdown()


def check_here(config: str, node: str, environ: dict[str, str]) -> str:
    """Run this node's checks in a separate process; returns its output, or the last line of its messages."""
    command = [sys.executable, "-P", "-m", "launcher.worker.checks.node_check", node]
    done = subprocess.run(command, input=config, capture_output=True, text=True, errors="replace", env={**os.environ, **environ})
    return done.stdout or (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        sys.exit(answer_prompts(sys.argv[2]))
    check_nodes(base64.b64decode(os.environ.pop(REQUEST_VARIABLE)).decode(), float(sys.argv[2]))
