"""Ray for `launcher doctor`: checks the cluster from here, and its nodes through a driver's tasks."""

from __future__ import annotations

import base64
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import launcher
from launcher.clusters.check_results import OK, WARNING, CheckResult, ReportReader, from_problem
from launcher.clusters.detached_process import build_pythonpath
from launcher.clusters.node_command import NodeCommand, uninterrupted
from launcher.clusters.ray import jobs
from launcher.clusters.ray.cluster import require_usable
from launcher.config.schema import RunConfig
from launcher.config.sections.ray import RaySection
from launcher.errors import RunError, SubmitError

_MODULE = "launcher.worker.ray.doctor"
# Stands for the request: the driver reads it from standard input or, as a job, in base64 from this variable.
FROM_INPUT, FROM_VARIABLE = "-", "LAUNCHER_DOCTOR_REQUEST"
_POLL_S = 1.0
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
    """Run the checks as a task on every node of the cluster.

    Raises:
        RunError: if the driver ended without a report, or did not end in time.
    """
    section = RaySection.of(config.cluster)
    request = json.dumps({"config": config.model_dump(mode="json"), "environ": {**section.env, **environ}})
    # The driver ends before the command gives up, so that it can report nodes that do not answer.
    seconds = f"{max(1.0, (deadline - time.monotonic()) * 0.9):.0f}"
    output = (_run_as_job if section.is_http else _run_here)(section, request, seconds, deadline, reader)
    if not reader.reports:
        is_late = time.monotonic() >= deadline
        raise RunError(
            "no node of the cluster reported" + (" in time" if is_late else ""),
            where=section.address or "",
            value=output,
            remedy="look at the cluster with: ray status; the launcher must be installed on its nodes, on the same path",
        )
    return []


def _run_here(section: RaySection, request: str, seconds: str, deadline: float, reader: ReportReader) -> str:
    """Run the driver on this machine; returns the end of its messages."""
    code = Path(launcher.__file__).resolve().parents[1]
    environ = {**os.environ, "PYTHONPATH": build_pythonpath(code, os.environ), "PYTHONSAFEPATH": "1"}
    # Everyone on the machine can read a process's arguments.
    driver = NodeCommand([sys.executable, "-m", _MODULE, FROM_INPUT, seconds], request, environ)
    try:
        for line in driver.lines(deadline):
            reader.feed(line)
    finally:
        with uninterrupted():
            driver.close()
    return " / ".join(line.strip() for line in list(driver.errors)[-3:])[-_MANY_CHARS:]


def _run_as_job(section: RaySection, request: str, seconds: str, deadline: float, reader: ReportReader) -> str:
    """Run the driver as a job on the cluster; stop and remove the job at the end; returns the end of its log."""
    address, code = section.address or "", Path(launcher.__file__).resolve().parents[1]
    name, environ = f"launcher-doctor-{secrets.token_hex(4)}", {FROM_VARIABLE: base64.b64encode(request.encode()).decode()}
    job = jobs.submit_module(section, code, name, _MODULE, [FROM_VARIABLE, seconds], environ)
    try:
        while True:
            state, message = jobs.state(address, job)
            log = jobs.read_log(address, job)
            # A line that is still being written does not end in a newline.
            for line in log.splitlines(keepends=True):
                if line.endswith("\n"):
                    reader.feed(line)
            if state in jobs.FINAL_JOB_STATES or time.monotonic() >= deadline:
                return (log.strip() or message)[-_MANY_CHARS:]
            time.sleep(_POLL_S)
    finally:
        with uninterrupted():
            jobs.end(address, job, 20 * _POLL_S)
