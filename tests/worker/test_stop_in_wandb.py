"""Stop in W&B's page, of which only the ranks know: the run is over on clusters that start runs again, as after a cancel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fake_slurm import FakeSlurm
from job_tools import Job
from played_workers import Played

from launcher import run_store
from launcher.plan.launch_plan import LaunchPlan


def test_on_slurm_it_is_not_requeued(submitted: Callable[..., Job], fake_slurm: FakeSlurm) -> None:
    of = submitted()
    of.begun()
    of.outcome("cancelled")
    of.saved(40)
    of.conclude()
    assert fake_slurm.told() == []
    assert (of.status.state, of.status.step, of.exit()["cause"]) == ("cancelled", 40, "cancelled")


def test_on_ray_its_workers_are_not_gathered_again(ray_plan: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    played = Played(ray_plan(working_dir=str(tmp_path)))
    played.begin("a", "n1", "n2")
    played.save(40)
    played.outcome("cancelled", 40)
    for worker in range(2):
        played.end(worker)
        answer = played.coordinator.beat("a", worker, "done")
    assert answer["verdict"]["again"] is False
    status = run_store.read_status(played.run)
    assert (status.state, status.step, played.causes) == ("cancelled", 40, ["cancelled"])
