"""What every backend can do with a run: start an attempt, tell its state, stop it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from launcher.config.cluster import ClusterSection
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_store import Status


class Cluster(Protocol):
    """A place where runs run. All state is on disk and with the scheduler; an instance keeps none.

    `ask_s`: whoever watches a run asks for its state at most this often; files are read as often as one likes.
    """

    ask_s: float

    def device(self, section: ClusterSection) -> DeviceFacts:
        """The accelerators of one of the nodes that `section` describes."""

    def check(self, plan: LaunchPlan) -> None:
        """Refuse what this backend cannot run.

        Raises:
            SubmitError: with the remedy, before anything was started.
        """

    def preview(self, plan: LaunchPlan) -> str | None:
        """The text that would be handed to a scheduler, or None where there is none."""

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        """Start one attempt of a run whose directory is complete, and return."""

    def started(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        """What a person wants to know of an attempt that was just submitted: labels and values."""

    def status(self, run: RunDir) -> Status:
        """The run's state, corrected by what the backend knows of its processes."""

    def await_end(self, run: RunDir) -> None:
        """Wait until an attempt whose last state is written has left no process."""

    def cancel(self, run: RunDir, save: bool = True) -> None:
        """Ask a running attempt to save and stop; asked a second time, or where nothing is to be saved, kill it."""


def cluster_for(kind: str) -> Cluster:
    """The backend that `cluster.kind` names."""
    if kind == "slurm":
        from launcher.clusters.slurm.cluster import SlurmCluster

        return SlurmCluster()
    from launcher.clusters.local import LocalCluster

    return {"local": LocalCluster}[kind]()
