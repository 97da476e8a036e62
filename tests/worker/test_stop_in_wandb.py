"""The Stop button on W&B's page ends a run for good on managed clusters, as a cancel does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fake_slurm import FakeSlurm
from fake_workers import FakeWorkers
from job_tools import Job

from launcher import run_store
from launcher.plan.launch_plan import LaunchPlan


def test_a_stop_in_wandb_does_not_requeue_a_slurm_job(submitted: Callable[..., Job], fake_slurm: FakeSlurm) -> None:
    of = submitted()
    of.begun()
    of.outcome("cancelled")
    of.saved(40)
    of.conclude()
    assert fake_slurm.told() == []
    assert (of.status.state, of.status.step, of.exit()["cause"]) == ("cancelled", 40, "cancelled")


def test_a_stop_in_wandb_starts_no_other_ray_workers(ray_plan: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    fake = FakeWorkers(ray_plan(working_dir=str(tmp_path)))
    fake.begin("a", "n1", "n2")
    fake.save(40)
    fake.outcome("cancelled", 40)
    for worker in range(2):
        fake.end(worker)
        answer = fake.coordinator.beat("a", worker, "done")
    assert answer.verdict.again is False
    status = run_store.read_status(fake.run)
    assert (status.state, status.step, fake.causes) == ("cancelled", 40, ["cancelled"])
