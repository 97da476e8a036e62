"""A first run on Slurm is submitted on two nodes, followed, and finishes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from e2e_tools import losses, modes_of
from forked import require_exit
from pace import wait_for
from slurm_tools import SETTINGS, Launch, SlurmRun
from testbed_cluster import Testbed

pytestmark = pytest.mark.slurm

STEPS = 12


def test_submitting_prints_the_job_and_following_it_ends_with_its_result(launch_here: Launch, slurm: Testbed, runs: Path) -> None:
    limits = (f"train.max_steps={STEPS}", "optim.lr=1e-3", "optim.schedule=constant")
    done = launch_here(*SETTINGS, *limits, f"run.root={runs}", "run.name=shown", **slurm.variables)
    require_exit(done)
    job = re.search(r"^job +(\d+)$", done.stdout, re.MULTILINE)
    assert job is not None
    assert slurm.output("squeue", "-h", "-j", job[1], "-o", "%j").strip() == "shown"
    for command in ("logs", "status", "cancel"):
        assert f"python -m launcher {command} " in done.stdout
    followed = launch_here("logs", "shown", "-f", "--root", str(runs), **slurm.variables)
    require_exit(followed)
    assert f"step {STEPS}" in followed.stdout or f"step-{STEPS:08d}" in followed.stdout
    run = SlurmRun(runs / "shown", slurm, launch_here)
    assert run.shown()["state"] == "completed"
    assert run.causes() == ["completed"]
    assert modes_of(run.path) == (0o700, 0o600)
    assert len(run.attempt_record(1)["nodes"]) == 2
    assert len(list(run.path.glob("attempts/001/rank-*.log"))) == 2
    assert (run.path / f"checkpoints/step-{STEPS:08d}/manifest.json").is_file()
    by_step = losses(run.path)
    assert sorted(by_step) == list(range(1, STEPS + 1))
    first, last = (sum(by_step[step] for step in steps) / 5 for steps in (range(1, 6), range(STEPS - 4, STEPS + 1)))
    assert last < first
    # Slurm ends the job a little after the run has ended.
    wait_for("an empty queue", lambda: not slurm.output("squeue", "-h", "--format=%j").strip())
