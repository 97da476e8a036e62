"""Drills from the command line, on this machine and on a real Slurm."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, processes_of, status
from testbed_cluster import Testbed

pytestmark = pytest.mark.rest

Launch = Callable[..., subprocess.CompletedProcess[str]]

ON_SLURM = ("+cluster=slurm", "cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.exclusive=false")


def drill(launch: Launch, fault: str, *settings: str, **env: str) -> dict:
    """The report of a drill; checks that the drill recovered and left no process running."""
    done = launch("drill", "--fault", fault, "--timeout", "8", "--json", *settings, "checkpoint.save_every=3", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["has_recovered"]
    assert report["differing_steps"] == 0
    assert report["checkpoints_kept"]
    run = Path(report["run"])
    assert status(run)["state"] == "cancelled", "the drill ends its run"
    assert not processes_of(run)
    return report


def test_drills_kill_a_rank_and_all_processes_of_this_machine(launch: Launch, runs: Path) -> None:
    killed = drill(launch, "kill-rank", *TINY, f"run.root={runs}")
    assert killed["action"] == "SIGKILL to rank 1"
    assert "rank 1: killed by SIGKILL" in killed["happened"]
    assert "as a user would" in killed["continued"]
    assert killed["lost_steps"] == killed["replayed_steps"] == killed["reached_step"] - killed["resumed_step"]
    assert 0 < killed["trains_again_s"] <= killed["caught_up_s"]

    # The drill uses the settings of the run before and leaves that run unchanged.
    before = sorted((file, file.stat().st_mtime_ns) for file in Path(killed["run"]).rglob("*"))
    preempted = drill(launch, "preempt", killed["run"])
    assert preempted["lost_steps"] == preempted["replayed_steps"] == 0
    assert preempted["happened"].startswith("preempted: the machine was asked to stop; saved at step")
    assert Path(preempted["run"]).parent == runs
    assert sorted((file, file.stat().st_mtime_ns) for file in Path(killed["run"]).rglob("*")) == before


def test_a_full_disk_drill_names_the_cause_and_resumes(launch: Launch, runs: Path) -> None:
    report = drill(launch, "fill-disk", *TINY, f"run.root={runs}")
    assert os.strerror(errno.EFBIG) in report["happened"]
    assert str(Path(report["run"]) / "checkpoints") in report["happened"]
    assert "saved once there was space again" in report["continued"]


@pytest.mark.slurm
def test_slurm_restarts_a_killed_rank_in_its_allocation(launch: Launch, slurm: Testbed, runs: Path) -> None:
    report = drill(launch, "kill-rank", *TINY, *ON_SLURM, f"run.root={runs}", **slurm.variables)
    assert (report["action"], report["host"]) == ("SIGKILL to rank 1", "n2")
    assert report["continued"].startswith("in the same allocation (job ")
    assert report["trains_again_s"] < 60
    assert slurm.output("squeue", "-h") == ""


@pytest.mark.slurm
def test_a_preempted_run_is_requeued_and_loses_no_step(launch: Launch, slurm: Testbed, runs: Path) -> None:
    report = drill(launch, "preempt", *TINY, *ON_SLURM, f"run.root={runs}", **slurm.variables)
    assert report["happened"].startswith("preempted: ")
    assert "requeued as the same job" in report["continued"]
    assert report["lost_steps"] == 0
    assert slurm.output("squeue", "-h") == ""


@pytest.mark.slurm
def test_a_dry_run_of_a_drill_shows_the_batch_script(launch_here: Launch, slurm: Testbed, runs: Path) -> None:
    dry = ("cluster.dry_run=true", f"run.root={runs}")
    done = launch_here("drill", "--fault", "hang", *TINY, *ON_SLURM, *dry, **slurm.variables)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2" in done.stdout
    assert not runs.exists()
