"""A run's life under Slurm as its user sees it: submitted, waiting, followed, cancelled, resumed, swept, never twice at once."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import losses, metrics, wait_for
from slurm_tools import SETTINGS, Launch, SlurmRun, submit
from testbed_cluster import Testbed

pytestmark = [pytest.mark.slurm, pytest.mark.rest]

ENDLESS = "train.max_steps=100000"


def test_two_ranks_on_each_node_resume_on_one_and_further(begin: Callable[..., SlurmRun], undisturbed: Path) -> None:
    run = begin("grid", "cluster.ranks_per_node=2", "train.max_steps=40")
    run.await_completed()
    assert len(list(run.path.glob("attempts/001/rank-*.log"))) == 4
    again = ("train.max_steps=60", "cluster.nodes=1", "cluster.ranks_per_node=2")
    done = run.launch("resume", str(run.path), *again, "--follow", **run.bed.variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step-00000060" in done.stdout
    assert sorted(losses(run.path)) == list(range(1, 61))
    nodes = {m["trainer/step"]: m["run/nodes"] for m in metrics(run.path) if "run/nodes" in m}
    assert (nodes[1], nodes[40], nodes[41]) == (2, 2, 1)


def test_what_is_printed_leads_to_the_job_and_following_ends_with_its_result(launch: Launch, slurm: Testbed, runs: Path) -> None:
    began = time.monotonic()
    done = launch(*SETTINGS, f"run.root={runs}", "run.name=shown", "train.max_steps=10", **slurm.variables)
    assert time.monotonic() - began < 30
    assert done.returncode == 0, done.stderr
    job = re.search(r"^job +(\d+)$", done.stdout, re.MULTILINE)
    assert job is not None
    assert slurm.output("squeue", "-h", "-j", job[1], "-o", "%j").strip() == "shown"
    for command in ("logs", "status", "cancel"):
        assert f"python -m launcher {command} " in done.stdout
    followed = launch("logs", "shown", "-f", "--root", str(runs), **slurm.variables)
    assert followed.returncode == 0
    assert "step 10" in followed.stdout or "step-00000010" in followed.stdout
    assert launch("status", "shown", "--root", str(runs), "--json", **slurm.variables).stdout.count("completed")
    bad = launch(*SETTINGS, f"run.root={runs}", "run.name=bad", "optim.lr=1e38", "follow=true", **slurm.variables)
    assert bad.returncode == 1
    assert "resume" in bad.stderr or "start it again" in bad.stderr


def test_a_waiting_run_says_why_and_can_be_cancelled(launch: Launch, slurm: Testbed, runs: Path) -> None:
    held = submit(launch, slurm, runs, "held", "+cluster.additional_parameters.begin=now+3600")
    shown = held.shown()
    assert shown["state"] == "pending"
    assert "BeginTime" in shown["message"]
    slurm.run("scontrol", "hold", held.job)
    assert "held" in held.shown()["message"].lower()
    cancelled = launch("cancel", str(held.path), **slurm.variables)
    assert cancelled.returncode == 0, cancelled.stderr
    assert held.shown()["state"] == "cancelled"
    assert not held.queued()
    first = slurm.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "exit 1", capture_output=True).stdout.strip()
    never = submit(launch, slurm, runs, "never", f"cluster.dependency='afterok:{first}'")
    wait_for("the dependency to fail", lambda: "DependencyNeverSatisfied" in never.shown()["message"], 40)
    assert launch("cancel", str(never.path), **slurm.variables).returncode == 0


def test_a_running_run_is_cancelled_with_and_without_a_checkpoint(begin: Callable[..., SlurmRun]) -> None:
    run = begin("saved", ENDLESS, "train.save_every=0")
    run.await_step(5)
    assert run.launch("cancel", str(run.path), **run.bed.variables).returncode == 0
    ended = run.await_state("cancelled")
    assert ended["step"] >= 5
    assert (run.path / "checkpoints" / f"step-{ended['step']:08d}" / "manifest.json").is_file()
    wait_for("the job to end", lambda: not run.queued(), 40)
    done = run.launch("resume", str(run.path), **run.bed.variables)
    assert done.returncode == 0, done.stderr
    run.await_step(ended["step"] + 2, attempt=2)
    assert run.launch("cancel", str(run.path), "--no-save", **run.bed.variables).returncode == 0
    wait_for("the job to end", lambda: not run.queued(), 40)
    assert run.await_state("cancelled")["state"] == "cancelled"
    time.sleep(7)
    assert not run.queued(), "a cancelled job never comes back"
    assert run.attempt == 2


def test_a_job_that_a_person_cancels_with_scancel_does_not_come_back(begin: Callable[..., SlurmRun]) -> None:
    run = begin("scancelled", ENDLESS)
    run.await_step(5)
    run.bed.run("scancel", run.job)
    wait_for("the job to end", lambda: not run.queued(), 40)
    assert run.shown()["state"] == "cancelled"
    time.sleep(7)
    assert not run.queued()
    assert run.attempt == 1


def test_a_run_never_runs_twice_at_once(begin: Callable[..., SlurmRun]) -> None:
    run = begin("single", ENDLESS)
    run.await_step(3)
    refused = run.launch("resume", str(run.path), **run.bed.variables)
    assert refused.returncode == 2
    assert "already" in refused.stderr
    script = next((run.path / "jobs" / run.job).glob("*_submission.sh"))
    pickled = run.path / "jobs" / run.job / f"{run.job}_submitted.pkl"
    other = run.bed.run("sbatch", "--parsable", script, capture_output=True).stdout.strip()
    assert pickled.is_file()
    wait_for("the second job to end", lambda: not run.queued(other), 40)
    assert f"job {run.job} runs single already" in (run.path / "jobs" / other / f"{other}_0_log.out").read_text()
    assert run.attempt == 1
    assert run.shown()["state"] in ("running", "saving")
    assert run.launch("cancel", str(run.path), "--no-save", **run.bed.variables).returncode == 0


def test_a_sweep_submits_a_job_for_each_point_and_returns(launch: Launch, slurm: Testbed, runs: Path) -> None:
    sweep = (*SETTINGS, "cluster.nodes=1", "train.max_steps=3", f"run.root={runs}")
    done = launch(*sweep, "-m", "optim.lr=1e-5,2e-5", **slurm.variables)
    assert done.returncode == 0, done.stderr
    names = [p.name for p in runs.iterdir()]
    assert len(names) == 2
    table = done.stdout[done.stdout.rindex("settings") :]
    assert "optim.lr=1e-05" in table
    assert "optim.lr=2e-05" in table
    plans = [json.loads((runs / name / "plan.json").read_text()) for name in names]
    groups = {plan["config"]["tracking"]["group"] for plan in plans}
    assert len(groups) == 1
    assert None not in groups
    for name in names:
        SlurmRun(runs / name, slurm, launch).await_state("completed")
    refused = launch(*sweep, "-m", "optim.lr=1e-5,2e-5", "cluster.partition=main,nowhere", **slurm.variables)
    assert refused.returncode == 2
    assert "nowhere" in refused.stderr
    assert len(list(runs.iterdir())) == 2, "nothing is started where one of them is refused"
