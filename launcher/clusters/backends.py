"""The protocol that every backend implements, and the table of backends.

A backend imports the models of settings and plans where it starts runs, so that commands that only ask for states answer quickly.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from launcher import run_store
from launcher.clusters import detached_process
from launcher.clusters.faults import InjectedFault
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Status
from launcher.security import ownership

if TYPE_CHECKING:
    from launcher.clusters.check_results import CheckResult, ReportReader
    from launcher.config.schema import RunConfig
    from launcher.config.sections.cluster import ClusterSection
    from launcher.plan.launch_plan import DeviceFacts, LaunchPlan

# The class of each backend, as module:Class, by `cluster.kind`. A backend is imported when a run uses it. The class of its
# settings is in launcher.config.sections.backends.SECTIONS.
BACKENDS: dict[str, str] = {
    "local": "launcher.clusters.local:LocalCluster",
    "slurm": "launcher.clusters.slurm.cluster:SlurmCluster",
    "ray": "launcher.clusters.ray.cluster:RayCluster",
    "static": "launcher.clusters.static.cluster:StaticCluster",
}

# The module of each backend that has nodes beside this machine with what `launcher doctor` asks of it, see `ClusterDoctor`.
DOCTORS: dict[str, str] = {
    "slurm": "launcher.clusters.slurm.doctor",
    "ray": "launcher.clusters.ray.doctor",
}

# The module of each backend with nodes that answer the prompts of `launcher evaluate`, see `EvaluationNodes`.
EVALUATION_NODES: dict[str, str] = {
    "slurm": "launcher.clusters.slurm.evaluation",
    "ray": "launcher.clusters.ray.evaluation",
}

# The message of a run that is pending although nothing was submitted.
NEVER_SUBMITTED = "the run was never submitted: the command that created it ended first"


# After how long without output another user's run without a liveness file is taken for ended: a queued run may wait, and a save
# or an evaluation of a large model write nothing for minutes.
_OUTPUT_TIMEOUT_S = 1800.0


class StatusReader(Protocol):
    """What tells the state of a run.

    `status_interval_s`: seconds between two calls of `status` by a command that watches a run.
    """

    status_interval_s: float

    def status(self, run: RunDir) -> Status:
        """Read the run's state and correct it by what the backend knows of its processes."""


class Cluster(StatusReader, Protocol):
    """Submit side of a backend. All state is on disk and with the scheduler; an instance keeps none.

    `drill_remedy`: how a person rehearses a fault where `launcher drill` cannot, or None if `inject_fault` works.
    """

    drill_remedy: str | None

    def device(self, section: ClusterSection) -> DeviceFacts:
        """Describe the accelerators of one of the nodes that `section` asks for."""

    def check(self, plan: LaunchPlan) -> None:
        """Refuse what this backend cannot run.

        Raises:
            SubmitError: with the remedy, before anything was started.
        """

    def preview(self, plan: LaunchPlan) -> str | None:
        """Return the text that would be handed to a scheduler, or None if there is none."""

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        """Start one attempt of a run whose directory is complete, and return without waiting for its end.

        Raises:
            SubmitError, RunError: if the backend refuses it; the run's status is then failed.
        """

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        """Return what a person wants to know of an attempt that was just submitted, as labels and values."""

    def await_end(self, run: RunDir) -> None:
        """Wait until an attempt whose last state is written has left no process."""

    def cancel(self, run: RunDir, save: bool = True) -> None:
        """Ask a running attempt to save and stop; on a second call, or with `save` false, kill it.

        Raises:
            SubmitError: if the run is not running, or cannot be reached from this machine.
        """

    def inject_fault(self, run: RunDir, attempt: int, fault: str) -> InjectedFault:
        """Inject a fault of `launcher.worker.fault_injection` into a running attempt, on its last node.

        Raises:
            RunError: if it could not be injected.
        """


class ClusterDoctor(Protocol):
    """What `launcher doctor` asks of a backend: a module with these functions."""

    def check_submission(self, config: RunConfig) -> list[CheckResult]:
        """Check what this machine sees of the scheduler, as a submission would."""

    def runs_elsewhere(self, config: RunConfig) -> bool:
        """Return whether the run's nodes are others than this machine."""

    def run_on_nodes(
        self, config: RunConfig, environ: Mapping[str, str], deadline: float, reader: ReportReader
    ) -> list[CheckResult]:
        """Run launcher.worker.doctor.node on every node, and give its output to `reader`; leaves nothing running.

        Returns what the way to the nodes has shown. `environ` is what the processes need in their environment; `deadline` is a
        time of time.monotonic().

        Raises:
            RunError, SubmitError: if nodes could not be had, or some have not reported; `reader` has the others.
        """


class EvaluationNodes(Protocol):
    """What `launcher evaluate` asks of a backend: a module with these functions.

    `SUBMITS_JOBS`: whether an evaluation can be a job that needs no command to wait for it, see `EvaluationJobs`.
    """

    SUBMITS_JOBS: bool

    def runs_elsewhere(self, config: RunConfig) -> bool:
        """Return whether the nodes are others than this machine."""

    def run_on_nodes(self, config: RunConfig, run: RunDir, folder: Path) -> None:
        """Run launcher.worker.evaluation.node on every node, and wait for its end; leaves nothing running.

        Raises:
            RunError, SubmitError: if nodes could not be had, or one of them failed.
        """


class EvaluationJobs(EvaluationNodes, Protocol):
    """A module whose evaluations can be jobs: each runs `launcher evaluate` for one step on one node, one after another."""

    def submit_job(self, plan: LaunchPlan, run: RunDir, step: int) -> str:
        """Submit the job and return its number.

        Raises:
            RunError, SubmitError: if that is not possible.
        """

    def ended_jobs(self, plan: LaunchPlan, jobs: Sequence[str]) -> dict[str, str]:
        """Return those of the jobs that have ended, each with its state.

        Raises:
            RunError: if the scheduler does not answer.
        """

    def cancel_jobs(self, jobs: Sequence[str]) -> None:
        """Cancel the jobs; if the scheduler does not answer, they go on."""


def evaluation_nodes_for(kind: str) -> EvaluationNodes | None:
    """Import the module of EVALUATION_NODES for a backend, or None if answers come from this machine."""
    return cast("EvaluationNodes", importlib.import_module(EVALUATION_NODES[kind])) if kind in EVALUATION_NODES else None


def doctor_for(kind: str) -> ClusterDoctor | None:
    """Import the module of DOCTORS for a backend, or None if it has none, as the runs are on this machine."""
    return cast("ClusterDoctor", importlib.import_module(DOCTORS[kind])) if kind in DOCTORS else None


def cluster_for(kind: str) -> Cluster:
    """Import the backend that `cluster.kind` names and return an instance.

    Raises:
        RunError: if there is no such backend, as for a run of a launcher that has others.
    """
    if kind not in BACKENDS:
        remedy = f"use the launcher that started the run; this one has {', '.join(BACKENDS)}"
        raise RunError("there is no such backend", where="cluster.kind", value=kind, remedy=remedy)
    module, _, name = BACKENDS[kind].partition(":")
    backend: Cluster = getattr(importlib.import_module(module), name)()
    return backend


class FilesOnly:
    """Tells the state of a run from its files alone: another user's records name no address that gets this user's token.

    `is_silent`: whether a run that keeps a liveness file had stopped refreshing it when its state was last read, or another run
    its output. It has then probably ended, and nothing will say so.
    """

    status_interval_s = 1.0

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self.is_silent = False

    def status(self, run: RunDir) -> Status:
        status = run_store.read_status(run)
        if status.state not in RUNNING_STATES:
            return status
        note, silence = f"shown from its files alone: {self._reason}", ""
        if status.state != "pending" and run.alive.is_file():
            silent_s, limit_s, sign = detached_process.seconds_silent(run), detached_process.LIVENESS_TIMEOUT_S, "sign of life"
        else:
            silent_s, limit_s, sign = detached_process.seconds_without_output(run), _OUTPUT_TIMEOUT_S, "output"
        self.is_silent = silent_s > limit_s
        if self.is_silent:
            silence = f"no {sign} for {silent_s / 60:.0f} minutes"
        return replace(status, message="; ".join(filter(None, (status.message, silence, note))))


def status_reader_for(run: RunDir, kind: str) -> StatusReader:
    """Return the backend of a run that this user trusts, and for another user's run a reader of its files.

    Raises:
        RunError: if there is no such backend.
        SubmitError: if a file of another user's run cannot be read safely.
    """
    ownership.require_plain_files(run)
    problem = ownership.records_problem(run)
    return cluster_for(kind) if problem is None else FilesOnly(problem.message)
