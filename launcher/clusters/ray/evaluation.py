"""Ray for `launcher evaluate`: a driver's tasks, one for each GPU, answer the prompts."""

from __future__ import annotations

import os
import secrets
import sys
import time
from pathlib import Path

import launcher
from launcher.clusters.detached_process import build_pythonpath
from launcher.clusters.node_command import NodeCommand, show_lines, uninterrupted
from launcher.clusters.ray import jobs
from launcher.clusters.ray.cluster import require_usable
from launcher.config.schema import RunConfig
from launcher.config.sections.ray import RaySection
from launcher.errors import RunError, SubmitError
from launcher.plan.run_dir import RunDir

SUBMITS_JOBS = False
_MODULE = "launcher.worker.ray.evaluation"
_LONGEST_WAIT_S = 30 * 24 * 3600.0
_POLL_S = 1.0
# How long the Jobs API may fail: a busy head node or a reconnecting tunnel comes back.
_SILENT_S = 300.0
_END_S = 20.0


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
    lines = _run_as_job(section, folder) if section.is_http else _run_here(section, folder)
    if not (folder / "answers.json").is_file():
        raise RunError(
            "the nodes of the cluster have not answered all prompts",
            where=section.address or "",
            value=" / ".join(lines[-3:]),
            remedy="start the same command again, it continues; look at the cluster with: ray status",
        )


def _run_here(section: RaySection, folder: Path) -> list[str]:
    """Run the driver on this machine; returns the last lines of its output."""
    code = Path(launcher.__file__).resolve().parents[1]
    environ = {**os.environ, "PYTHONPATH": build_pythonpath(code, os.environ), "PYTHONSAFEPATH": "1"}
    driver = NodeCommand([sys.executable, "-u", "-m", _MODULE, str(folder)], "", environ)
    try:
        lines = show_lines(driver, time.monotonic() + _LONGEST_WAIT_S)
        return [*lines, *(line.strip() for line in driver.errors if line.strip())]
    finally:
        with uninterrupted():
            driver.close()


def _run_as_job(section: RaySection, folder: Path) -> list[str]:
    """Run the driver as a job on the cluster; stop and remove the job at the end; returns the last lines of its log."""
    address, code = section.address or "", Path(launcher.__file__).resolve().parents[1]
    job = jobs.submit_module(section, code, f"launcher-evaluate-{secrets.token_hex(4)}", _MODULE, [str(folder)])
    num_shown, answered_at = 0, time.monotonic()
    try:
        while True:
            try:
                state, message = jobs.state(address, job)
                lines = jobs.read_log(address, job).splitlines()
            except jobs.JobUnknown:
                raise
            except SubmitError:
                if time.monotonic() - answered_at > _SILENT_S:
                    raise
                time.sleep(_POLL_S)
                continue
            answered_at = time.monotonic()
            for line in lines[num_shown:]:
                print(line, file=sys.stderr, flush=True)
            num_shown = max(num_shown, len(lines))
            if state in jobs.FINAL_JOB_STATES:
                return [*lines, message]
            time.sleep(_POLL_S)
    finally:
        with uninterrupted():
            jobs.end(address, job, _END_S)
