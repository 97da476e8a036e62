"""What the nodes of a Ray cluster do beside runs: `launcher doctor` checks them, and for `launcher evaluate` they answer prompts.

A driver, here or as a job of the cluster, starts a task on each node or GPU (launcher.worker.ray.node_tasks).
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from launcher.clusters.check_results import OK, WARNING, CheckResult, ReportReader, from_problem
from launcher.clusters.node_command import show_line
from launcher.clusters.ray import jobs
from launcher.clusters.ray.address import require_usable
from launcher.config.schema import RunConfig
from launcher.config.sections.ray import RaySection
from launcher.errors import RunError, SubmitError
from launcher.plan.run_dir import RunDir

SUBMITS_JOBS = False
# The driver's request to check nodes, in base64: everyone on a machine can read a process's arguments.
REQUEST_VARIABLE = "LAUNCHER_DOCTOR_REQUEST"
_DRIVER = "launcher.worker.ray.node_tasks"
_MANY_CHARS = 300
_LONGEST_WAIT_S = 30 * 24 * 3600.0


def runs_elsewhere(config: RunConfig) -> bool:
    return RaySection.of(config.cluster).address is not None


def check_submission(config: RunConfig) -> list[CheckResult]:
    """Check that the cluster answers and accepts this shell's token."""
    section, version = RaySection.of(config.cluster), metadata.version("ray")
    if section.address is None:
        return [CheckResult("Ray", OK, f"Ray {version}; each run starts one of its own on this machine")]
    try:
        require_usable(section)
    except SubmitError as error:
        return [from_problem(problem, name="Ray") for problem in error.problems]
    results = [CheckResult("Ray", OK, f"{section.address} answers; Ray {version} here")]
    if os.environ.get("RAY_AUTH_MODE") != "token":
        seen = "this shell uses no token: anyone who can reach the cluster can run code there"
        remedy = "start the cluster with RAY_AUTH_MODE=token, and export it here with RAY_AUTH_TOKEN_PATH=FILE"
        results.append(CheckResult("Ray", WARNING, seen, remedy))
    return results


def check_nodes(config: RunConfig, environ: Mapping[str, str], deadline: float, reader: ReportReader) -> list[CheckResult]:
    """Run the checks as a task on every node of the cluster."""
    section = RaySection.of(config.cluster)
    request = json.dumps({"config": config.model_dump(mode="json"), "environ": {**section.env, **environ}})
    variables = {REQUEST_VARIABLE: base64.b64encode(request.encode()).decode()}
    # The driver ends before the command gives up, so that it can report nodes that do not answer.
    seconds = f"{max(1.0, (deadline - time.monotonic()) * 0.9):.0f}"
    messages = jobs.run_driver(section, "doctor", _DRIVER, ["check", seconds], variables, deadline, reader.feed)
    if not reader.reports:
        raise RunError(
            "no node of the cluster reported" + (" in time" if time.monotonic() >= deadline else ""),
            where=section.address or "",
            value=" / ".join(messages[-3:])[-_MANY_CHARS:],
            remedy="look at the cluster with: ray status; the launcher must be installed on its nodes, on the same path",
        )
    return []


def answer_prompts(config: RunConfig, run: RunDir, folder: Path) -> None:
    """Run the evaluation's processes as tasks on the cluster, one for each GPU."""
    section = RaySection.of(config.cluster)
    require_usable(section)
    until = time.monotonic() + _LONGEST_WAIT_S
    lines = jobs.run_driver(section, "evaluate", _DRIVER, ["answer", str(folder)], {}, until, show_line)
    if not (folder / "answers.json").is_file():
        raise RunError(
            "the nodes of the cluster have not answered all prompts",
            where=section.address or "",
            value=" / ".join(lines[-3:]),
            remedy="start the same command again, it continues; look at the cluster with: ray status",
        )
