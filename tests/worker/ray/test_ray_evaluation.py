"""An evaluation on Ray reserves GPUs within a deadline, and its workers import nothing from other folders."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pace import slowness

import launcher

REPO = Path(__file__).resolve().parents[3]


def test_no_driver_gives_its_working_directory_to_workers() -> None:
    """Unless told otherwise, Ray puts the working directory first in the workers' sys.path."""
    files = Path(launcher.__file__).parent.rglob("*.py")
    calls = [
        (file.name, {keyword.arg for keyword in node.keywords})
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init"
    ]
    assert len(calls) > 2
    assert [name for name, keywords in calls if "job_config" not in keywords] == []


# Runs in a process of its own: Ray reads its variables once per process, and other tests use a Ray with a token.
WAITING = """
import math, sys
import ray
from ray.util.placement_group import placement_group
from launcher.worker.ray import connection, evaluation

slowness = float(sys.argv[1])
ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
try:
    evaluation._RECOUNT_S = 1
    assert len(evaluation.task_options(ray, 1, 60.0 * slowness)) == 1
    # At first, Ray still counts the GPU that has just been reserved.
    count, old = ray.available_resources, [{"GPU": 2.0}]
    ray.available_resources = lambda: old.pop() if old else count()
    (second,) = evaluation.task_options(ray, None, 60.0 * slowness)
    code = ray.remote(lambda: 7).options(**second).remote()
    assert ray.get(code, timeout=120 * slowness) == 7
    assert evaluation.task_options(ray, None, 1.0) == [], "both GPUs are reserved"
    assert evaluation.task_options(ray, None, 1.0, gpus_per_task=2) == []
    assert not placement_group([{"GPU": 1}]).wait(0.1)
    connection.remove_placement_groups()
    assert placement_group([{"GPU": 2}]).wait(math.ceil(60 * slowness))
finally:
    ray.shutdown()
"""


@pytest.mark.rest
@pytest.mark.ray
def test_an_evaluation_waits_for_gpus_only_as_long_as_it_may() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_gcs_server_port_wait_time_s": "120",
    }
    command = [sys.executable, "-c", WAITING, str(slowness())]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=REPO, timeout=240 * slowness())
    assert done.returncode == 0, done.stdout + done.stderr
