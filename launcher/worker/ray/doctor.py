"""The driver of `launcher doctor` on Ray: `python -m launcher.worker.ray.doctor SECONDS`.

Runs launcher.worker.checks.node_check as a task on every node, with all of its GPUs, and prints the reports. If other work holds
a node's GPUs, the driver reports this instead of waiting.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import launcher
from launcher.clusters.check_results import FAILURE, WARNING, CheckResult, MachineReport, to_lines
from launcher.clusters.detached_process import build_pythonpath
from launcher.clusters.ray.doctor import REQUEST_VARIABLE
from launcher.config.schema import RunConfig
from launcher.config.sections.ray import RaySection
from launcher.worker.ray import connection


def check_here(config: str, node: str, environ: dict[str, str]) -> str:
    """Run this node's checks in a separate process; returns its output, or the last line of its messages."""
    import os
    import subprocess
    import sys

    command = [sys.executable, "-P", "-m", "launcher.worker.checks.node_check", node]
    done = subprocess.run(command, input=config, capture_output=True, text=True, errors="replace", env={**os.environ, **environ})
    return done.stdout or (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def main(request: str, seconds: float) -> None:
    until, values = time.monotonic() + seconds, json.loads(request)
    config, environ = RunConfig.model_validate(values["config"]), values["environ"]
    section = RaySection.of(config.cluster)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray._private.state import available_resources_per_node
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    path = build_pythonpath(Path(launcher.__file__).resolve().parents[1], os.environ)
    connection.join(section, {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}, log_to_driver=False, logging_level="WARNING")
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        # Ranks may run on those with GPUs, or on all nodes if none has a GPU.
        nodes = [node for node in nodes if node["Resources"].get("GPU")] or nodes
        num_free = available_resources_per_node()
        tasks = {}
        for node in nodes:
            name, num_gpus = node["NodeName"], node["Resources"].get("GPU", 0)
            if (num_held := num_gpus - num_free.get(node["NodeID"], {}).get("GPU", 0)) > 0:
                seen = f"{num_held:g} of {num_gpus:g} GPUs are held by other work of Ray: the node was not checked"
                _print_report(name, CheckResult("node", WARNING, seen, "wait until that work has ended, or see: ray status"))
                continue
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(check_here).options(num_cpus=0, num_gpus=num_gpus, max_retries=0, scheduling_strategy=strategy)
            tasks[task.remote(config.model_dump_json(), name, environ)] = name
        waiting = list(tasks)
        while waiting and time.monotonic() < until:
            done, waiting = ray.wait(waiting, timeout=max(0.1, until - time.monotonic()))
            for task in done:
                _print_output(ray, task, tasks[task])
        for task in waiting:
            result = CheckResult("node", FAILURE, f"no answer within {seconds:.0f} s", "look at the node with: ray status")
            _print_report(tasks[task], result)
    finally:
        ray.shutdown()


def _print_output(ray: Any, task: Any, node: str) -> None:
    try:
        output = ray.get(task)
    # Ray raises many types of exceptions for a task that could not run.
    except Exception as error:
        output = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if "launcher-doctor " in output:
        print(output, flush=True)
        return
    remedy = "install the launcher on the node, under the same path; look at it with: ray status"
    _print_report(node, CheckResult("node", FAILURE, f"the checks could not run: {output}", remedy))


def _print_report(node: str, result: CheckResult) -> None:
    print("\n".join(to_lines(MachineReport(node, (result,)))), flush=True)


if __name__ == "__main__":
    main(base64.b64decode(os.environ.pop(REQUEST_VARIABLE)).decode(), float(sys.argv[1]))
