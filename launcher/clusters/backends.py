"""The protocol that every backend implements, and the table of backends.

A backend imports the settings and plan models only where it starts runs, so that commands that only read states stay fast.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from launcher.clusters import detached_process
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.runs.run_records import RUNNING_STATES, Status
from launcher.security import folders

if TYPE_CHECKING:
    from launcher.clusters.check_results import CheckResult, ReportReader
    from launcher.config.schema import RunConfig
    from launcher.config.sections.cluster import ClusterSection
    from launcher.plan.launch_plan import DeviceFacts, LaunchPlan

# The class of each backend, as module:Class, keyed by `cluster.kind`. A backend is imported when a run uses it. Its settings
# class is in launcher.config.schema.SECTIONS.
BACKENDS: dict[str, str] = {
    "local": "launcher.clusters.local:LocalCluster",
    "slurm": "launcher.clusters.slurm.cluster:SlurmCluster",
    "ray": "launcher.clusters.ray.cluster:RayCluster",
    "static": "launcher.clusters.static:StaticCluster",
}

# The module that `launcher doctor` and `launcher evaluate` use for each backend with nodes other than this machine, see
# `ClusterNodes`.
NODES: dict[str, str] = {
    "slurm": "launcher.clusters.slurm.allocation",
    "ray": "launcher.clusters.ray.nodes",
}

# Seconds without output after which another user's run without a liveness file counts as ended. A queued run may wait, and a
# save or an evaluation of a large model writes nothing for minutes.
_OUTPUT_TIMEOUT_S = 1800.0
# Seconds for the command on the node: to reach the node, find the run's processes, and act.
FAULT_DEADLINE_S = 60.0


@dataclass(frozen=True)
class InjectedFault:
    """What was done, when (in seconds since the epoch), and on which host."""

    description: str
    at: float
    host: str


class StatusReader(Protocol):
    """Reads the state of a run.

    `status_interval_s`: seconds between calls of `status` by a command that watches a run.
    """

    status_interval_s: float

    def status(self, run: RunDir) -> Status:
        """Read the run's state, corrected by what the backend knows about its processes."""


class Cluster:
    """The submit side of a backend. All state is on disk and with the scheduler; instances hold none.

    A backend defines at least `submit` and `cancel`; the other defaults suit nodes like this machine. `drill_remedy`:
    how to rehearse a fault if `launcher drill` cannot, or None if `inject_fault` works.
    """

    status_interval_s: float = 1.0
    drill_remedy: str | None = "start a short run, and kill its processes"

    def device(self, section: ClusterSection) -> DeviceFacts:
        """Describe the accelerators of one of the nodes that `section` requests."""
        from launcher.hardware import device

        return device()

    def check(self, plan: LaunchPlan) -> None:
        """Reject what this backend cannot run.

        Raises:
            SubmitError: with the remedy, before anything is started.
        """

    def preview(self, plan: LaunchPlan) -> str | None:
        """Return the text that would be passed to a scheduler, or None if there is none."""
        return None

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        """Start one attempt of a run whose directory is complete; do not wait for its end.

        Raises:
            SubmitError, RunError: if the backend refuses it; the run's status is then failed.
        """
        raise NotImplementedError

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        """Return details of a newly submitted attempt for the user, as labels and values."""
        return []

    def status(self, run: RunDir) -> Status:
        """Read the run's state, corrected by what the backend knows about its processes.

        By default a process in the status leads the run: once it has ended without recording that, the run has failed.
        """
        status = run_store.read_status(run)
        if status.state in RUNNING_STATES and status.job is None:
            return mark_never_submitted(status, detached_process.START_DEADLINE_S)
        if status.state not in RUNNING_STATES or detached_process.is_alive(run, status):
            return status
        # The process may have written its final state since the status was read.
        status = run_store.read_status(run)
        return replace(status, state="failed", message=self.explain_lost(run)) if status.state in RUNNING_STATES else status

    def explain_lost(self, run: RunDir) -> str:
        """Return why the process that leads the run may have ended without recording a result."""
        return "its process ended without recording a result"

    def await_end(self, run: RunDir) -> None:
        """Wait until no process is left of an attempt whose final state is written."""

    def cancel(self, run: RunDir, save: bool = True) -> None:
        """Ask a running attempt to save and stop; on a second call, or with `save` false, kill it.

        Raises:
            SubmitError: if the run is not running, or cannot be reached from this machine.
        """
        raise NotImplementedError

    def inject_fault(self, run: RunDir, attempt: int, fault: str) -> InjectedFault:
        """Inject a fault of `launcher.worker.fault_injection` into a running attempt, on its last node.

        Raises:
            RunError: if it could not be injected.
        """
        raise NotImplementedError


class ClusterNodes(Protocol):
    """What `launcher doctor` and `launcher evaluate` ask of a backend: a module with these functions.

    `SUBMITS_JOBS`: whether an evaluation can run as a job without a waiting command; only then it has the last two functions.
    Each job runs `launcher evaluate` for one step on one node, one after another.
    """

    SUBMITS_JOBS: bool

    def runs_elsewhere(self, config: RunConfig) -> bool:
        """Return whether the run's nodes are different from this machine."""

    def check_submission(self, config: RunConfig) -> list[CheckResult]:
        """Check what this machine sees of the scheduler, as a submission would."""

    def check_nodes(
        self, config: RunConfig, environ: Mapping[str, str], deadline: float, reader: ReportReader
    ) -> list[CheckResult]:
        """Run launcher.worker.checks.node_check on every node, and pass its output to `reader`; leaves nothing running.

        Returns the results found on the way to the nodes. `environ` holds the environment variables that the processes need;
        `deadline` is a time.monotonic() time.

        Raises:
            RunError, SubmitError: if nodes were unavailable, or some did not report; `reader` has the other reports.
        """

    def answer_prompts(self, config: RunConfig, run: RunDir, folder: Path) -> None:
        """Run launcher.evaluate.node on every node and wait for it to end; leaves nothing running.

        Raises:
            RunError, SubmitError: if nodes were unavailable, or one of them failed.
        """

    def submit_job(self, plan: LaunchPlan, run: RunDir, step: int) -> str:
        """Submit the job and return its number.

        Raises:
            RunError, SubmitError: if that is not possible.
        """

    def cancel_jobs(self, plan: LaunchPlan) -> None:
        """Cancel all such jobs of the run; if the scheduler does not answer, they continue."""


def nodes_for(kind: str) -> ClusterNodes | None:
    """Import the module of NODES for a backend, or return None if it has none because it uses this machine."""
    return cast("ClusterNodes", importlib.import_module(NODES[kind])) if kind in NODES else None


def mark_never_submitted(status: Status, deadline_s: float) -> Status:
    """Return the status of a run for which nothing was submitted: it has failed if that has not happened in `deadline_s`."""
    if status.state != "pending" or time.time() - status.updated_at <= deadline_s:
        return status
    return replace(status, state="failed", message="the run was never submitted: the command that created it ended first")


def cluster_for(kind: str) -> Cluster:
    """Import the backend that `cluster.kind` names and return an instance.

    Raises:
        RunError: if there is no such backend, for example because a launcher with other backends started the run.
    """
    if kind not in BACKENDS:
        remedy = f"use the launcher that started the run; this one has {', '.join(BACKENDS)}"
        raise RunError("there is no such backend", where="cluster.kind", value=kind, remedy=remedy)
    module, _, name = BACKENDS[kind].partition(":")
    backend: Cluster = getattr(importlib.import_module(module), name)()
    return backend


class FilesOnly:
    """Reads the state of a run from its files only: this user's token must not go to an address in another user's records.

    `is_silent`: the run had stopped refreshing its liveness file (or output) at the last look, and has probably ended.
    """

    status_interval_s = 1.0

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self.is_silent = False

    def status(self, run: RunDir) -> Status:
        status = run_store.read_status(run)
        if status.state not in RUNNING_STATES:
            return status
        note, silence = f"shown from its files only: {self._reason}", ""
        if status.state != "pending" and run.alive.is_file():
            silent_s, limit_s, sign = detached_process.seconds_silent(run), detached_process.LIVENESS_TIMEOUT_S, "sign of life"
        else:
            silent_s, limit_s, sign = detached_process.seconds_without_output(run), _OUTPUT_TIMEOUT_S, "output"
        self.is_silent = silent_s > limit_s
        if self.is_silent:
            silence = f"no {sign} for {silent_s / 60:.0f} minutes"
        return replace(status, message="; ".join(filter(None, (status.message, silence, note))))


def status_reader_for(run: RunDir, kind: str) -> StatusReader:
    """Return the backend of a run that this user trusts, or a reader of its files for another user's run."""
    problem = folders.run_problem(run.root)
    return cluster_for(kind) if problem is None else FilesOnly(problem.message)


class AnswerSource(StrEnum):
    """Which machines answer, and when."""

    BESIDE_TRAINING = "on this machine at low priority beside training; what is left, before the run ends"
    AFTER_TRAINING = "on the GPUs of this machine after the last step, before the run ends"
    JOBS = "in a job of one node for each of these steps, one after another"
    NODES = "on idle GPUs of the cluster during training; no more after the last step"


def answer_source(config: RunConfig, device: str) -> AnswerSource:
    """Return where answers come from for a run on `device` (cpu or cuda)."""
    nodes = nodes_for(config.cluster.kind)
    if nodes is not None and nodes.runs_elsewhere(config):
        return AnswerSource.JOBS if nodes.SUBMITS_JOBS else AnswerSource.NODES
    return AnswerSource.AFTER_TRAINING if device == "cuda" else AnswerSource.BESIDE_TRAINING


def describe_answers(plan: LaunchPlan) -> str:
    """Describe how often prompts are answered, how many, and where."""
    config, steps = plan.config, plan.batch.max_steps
    every = config.eval.answers_every
    times = f" ({steps // every} times)" if steps is not None else ""
    prompts = f"up to {config.evaluate.max_prompts:,} prompts of each set, of up to {config.evaluate.max_new_tokens:,} tokens"
    return f"every {every} steps{times}: {prompts}; {answer_source(config, plan.topology.device)}"


def fault_command(run: RunDir, attempt: int, fault: str) -> list[str]:
    """Build the command that injects `fault` into the processes of an attempt on the node where it is started."""
    variables = [f"{name}={value}" for name, value in detached_process.python_variables(run.code, os.environ).items()]
    module = [sys.executable, "-m", "launcher.worker.fault_injection", fault, str(run.root), str(attempt)]
    return ["env", *variables, *module]


def read_fault_report(output: str) -> InjectedFault:
    """Read what the command printed; its last line is the report, as JSON."""
    return json_records.loads(InjectedFault, output.strip().splitlines()[-1].encode(), "the output of fault_injection")
