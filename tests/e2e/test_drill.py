"""Drills from the command line, on this machine and on a real Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_tools import TINY, processes_of
from forked import Launch, require_exit
from pace import slowness, wait_for
from testbed_cluster import Testbed

pytestmark = pytest.mark.rest


ON_SLURM = ("+cluster=slurm", "cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.exclusive=false")


def drill(launch_here: Launch, fault: str, *settings: str, **env: str) -> dict:
    """The report of a drill; checks that the drill recovered and left no process running."""
    done = launch_here("drill", "--fault", fault, "--timeout", "8", "--json", *settings, "checkpoint.save_every=3", **env)
    require_exit(done)
    report = json.loads(done.stdout)
    assert report["has_recovered"]
    assert report["differing_steps"] == 0
    assert report["checkpoints_kept"]
    run = Path(report["run"])
    # On Slurm, the scheduler reports the end: the job may be killed before it writes its own.
    shown = json.loads(launch_here("status", str(run), "--json", **env).stdout)
    assert shown["state"] == "cancelled", "the drill ends its run"
    wait_for("the run's processes to end", lambda: not processes_of(run), deadline_s=10)
    return report


def test_a_drill_preempts_this_machine(launch_here: Launch, runs: Path) -> None:
    preempted = drill(launch_here, "preempt", *TINY, f"run.root={runs}")
    assert preempted["happened"].startswith("preempted: the machine was asked to stop; saved at step")
    assert "as a user would" in preempted["continued"]
    assert preempted["lost_steps"] == preempted["replayed_steps"] == 0
    assert 0 < preempted["trains_again_s"] <= preempted["caught_up_s"]


@pytest.mark.slurm
def test_slurm_restarts_a_killed_rank_in_its_allocation(launch_here: Launch, slurm: Testbed, runs: Path) -> None:
    """tests/e2e/test_slurm_life.py preempts a job as the drill does; tests/cli/test_drill.py judges what follows."""
    killed = drill(launch_here, "kill-rank", *TINY, *ON_SLURM, f"run.root={runs}", **slurm.variables)
    assert (killed["action"], killed["host"]) == ("SIGKILL to rank 1", "n2")
    assert killed["continued"].startswith("in the same allocation, restart ")
    assert killed["lost_steps"] == killed["replayed_steps"] == killed["reached_step"] - killed["resumed_step"]
    assert killed["trains_again_s"] < 60 * slowness()
    assert slurm.output("squeue", "-h") == ""
