"""What every backend can do with a run: start an attempt, tell its state, stop it.

Who only asks for states waits for none of the models of settings and plans: backends import those where they start runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from launcher.checkpoint import store
from launcher.errors import SubmitError
from launcher.export import hub
from launcher.plan import disk
from launcher.plan.run_dir import RunDir
from launcher.run_records import Status

if TYPE_CHECKING:
    from launcher.config.cluster import ClusterSection
    from launcher.plan.launch_plan import DeviceFacts, LaunchPlan


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


def check_startable(plan: LaunchPlan) -> None:
    """Refuse what would train and could not be saved or pushed, on whatever backend.

    Raises:
        SubmitError: for a disk without room for one checkpoint, a push to the Hub without a token, and a mirror that cannot be
            written.
    """
    repo_id = plan.config.export.push_to_hub
    if repo_id and (problem := hub.token_problem("export.push_to_hub", repo_id)):
        raise SubmitError(problem)
    available = _free_bytes(plan)
    if available is not None and (problem := disk.refusal(plan, available)):
        raise SubmitError(problem)
    if plan.config.checkpoint.mirror is not None:
        from launcher.checkpoint.mirror import upload

        upload.require_usable(plan)


def disk_note(plan: LaunchPlan) -> str | None:
    """Said where the disk of the run directory, as this machine sees it, will not hold all checkpoints that are kept."""
    available = _free_bytes(plan)
    if available is None:
        return None
    return disk.note(plan, available, len(store.list_checkpoints(RunDir(Path(plan.run_dir)).checkpoints)))


def _free_bytes(plan: LaunchPlan) -> int | None:
    """What a user may still write where the run directory is or will be; None where that cannot be told from here."""
    folder = Path(plan.run_dir)
    try:
        while not folder.exists():
            folder = folder.parent
        # Checkpoints may lie on a disk of their own.
        own = RunDir(folder).checkpoints
        return shutil.disk_usage(own if own.exists() else folder).free
    except OSError:
        return None


def cluster_for(kind: str) -> Cluster:
    """The backend that `cluster.kind` names."""
    if kind == "slurm":
        from launcher.clusters.slurm.cluster import SlurmCluster

        return SlurmCluster()
    if kind == "ray":
        from launcher.clusters.ray.cluster import RayCluster

        return RayCluster()
    from launcher.clusters.local import LocalCluster

    return {"local": LocalCluster}[kind]()
