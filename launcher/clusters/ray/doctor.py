"""Ray for `launcher doctor`: checks the cluster from here, and its nodes through a driver's tasks."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Mapping
from importlib import metadata

from launcher.clusters.check_results import OK, WARNING, CheckResult, ReportReader, from_problem
from launcher.clusters.ray import jobs
from launcher.clusters.ray.cluster import require_usable
from launcher.config.schema import RunConfig
from launcher.config.sections.ray import RaySection
from launcher.errors import RunError, SubmitError

_MODULE = "launcher.worker.ray.doctor"
# The request for the driver, in base64: everyone on a machine can read a process's arguments.
REQUEST_VARIABLE = "LAUNCHER_DOCTOR_REQUEST"
_MANY_CHARS = 300


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


def run_on_nodes(config: RunConfig, environ: Mapping[str, str], deadline: float, reader: ReportReader) -> list[CheckResult]:
    """Run the checks as a task on every node of the cluster, started by a driver here, or by one that is a job there.

    Raises:
        RunError: if the driver ended without a report, or did not end in time.
    """
    section = RaySection.of(config.cluster)
    request = json.dumps({"config": config.model_dump(mode="json"), "environ": {**section.env, **environ}})
    variables = {REQUEST_VARIABLE: base64.b64encode(request.encode()).decode()}
    # The driver ends before the command gives up, so that it can report nodes that do not answer.
    seconds = f"{max(1.0, (deadline - time.monotonic()) * 0.9):.0f}"
    messages = jobs.run_driver(section, "doctor", _MODULE, [seconds], variables, deadline, reader.feed)
    if not reader.reports:
        raise RunError(
            "no node of the cluster reported" + (" in time" if time.monotonic() >= deadline else ""),
            where=section.address or "",
            value=" / ".join(messages[-3:])[-_MANY_CHARS:],
            remedy="look at the cluster with: ray status; the launcher must be installed on its nodes, on the same path",
        )
    return []
