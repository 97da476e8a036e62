"""A run on two Slurm nodes that is interrupted in every way; compared with one that was left alone."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import losses, metrics, status, wait_for
from slurm_tools import STEPS, SlurmRun, assert_same_training

pytestmark = [pytest.mark.slurm, pytest.mark.rest]


def test_a_signal_to_the_job_saves_and_requeues(begin: Callable[..., SlurmRun], undisturbed: Path) -> None:
    run = begin("signalled")
    run.await_step(25)
    job = run.job
    run.bed.run("scancel", "--signal=USR2", job)
    # Again, while it saves.
    time.sleep(0.3)
    run.bed.run("scancel", "--signal=USR2", job)
    run.await_step(40, attempt=2)
    assert run.job == job
    run.await_completed()
    assert run.causes() == ["preempted", "completed"]
    first = run.attempt_record(1, "exit")
    assert run.attempt_record(2)["resume_step"] == first["step"] == first["saved_step"]
    assert_same_training(run.path, undisturbed)
    steps = [m["trainer/step"] for m in metrics(run.path) if "train/loss" in m]
    assert steps == list(range(1, STEPS + 1)), "no step was done twice"


def test_a_signal_to_one_rank_alone_stops_all_at_one_step(begin: Callable[..., SlurmRun], undisturbed: Path) -> None:
    run = begin("onerank")
    run.await_step(25)
    run.ranks("n2")[0].send_signal(signal.SIGUSR2)
    run.await_completed()
    assert run.causes() == ["preempted", "completed"]
    assert_same_training(run.path, undisturbed)


def test_a_job_of_a_higher_partition_takes_the_nodes_and_gives_them_back(
    begin: Callable[..., SlurmRun], undisturbed: Path
) -> None:
    run = begin("preempted", "cluster.exclusive=true", "cluster.nodelist='n[1-2]'")
    run.await_step(25)
    run.bed.run("sbatch", "-p", "high", "-w", "n[1-2]", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    wait_for("the run to be preempted", lambda: run.causes() == ["preempted"], 40)
    wait_for("the run to wait", lambda: run.shown()["state"] == "pending", 30)
    run.await_completed()
    # Slurm itself requeues what it preempts: requeued here as well it would run once too often.
    assert run.causes() == ["preempted", "completed"]
    assert run.attempt == 2
    assert_same_training(run.path, undisturbed)


def test_an_operator_requeues_the_job(begin: Callable[..., SlurmRun], undisturbed: Path) -> None:
    run = begin("requeued")
    run.await_step(25)
    run.bed.run("scontrol", "requeue", run.job)
    run.await_completed()
    assert run.attempt == 2
    assert_same_training(run.path, undisturbed)


def test_where_a_requeue_is_forbidden_the_run_is_submitted_again(begin: Callable[..., SlurmRun], undisturbed: Path) -> None:
    run = begin("norequeue", "cluster.requeue=false")
    run.await_step(25)
    job = run.job
    run.bed.run("scancel", "--signal=USR2", job)
    wait_for("another job", lambda: run.attempt == 2 and run.job not in ("", job), 60)
    run.await_completed()
    assert run.causes() == ["preempted", "completed"]
    assert_same_training(run.path, undisturbed)


def test_a_killed_rank_is_started_again_inside_the_allocation(begin: Callable[..., SlurmRun], undisturbed: Path) -> None:
    run = begin("rankkilled")
    run.await_step(45)
    killed = time.time()
    reached = max(losses(run.path))
    run.ranks("n2")[0].send_signal(signal.SIGKILL)
    wait_for("a step after the restart", lambda: any(m["time"] > killed and m.get("run/restarts") for m in metrics(run.path)), 60)
    again = next(m for m in metrics(run.path) if m["time"] > killed and m.get("run/restarts"))
    assert again["time"] - killed < 30
    assert 40 < again["trainer/step"] <= reached + 1
    run.await_completed()
    assert run.attempt == 1
    assert_same_training(run.path, undisturbed)


def test_a_stopped_rank_is_found_killed_and_started_again(begin: Callable[..., SlurmRun], undisturbed: Path) -> None:
    run = begin("stopped", "cluster.stall_seconds=6")
    run.await_step(25)
    stopped = time.time()
    run.ranks("n2")[0].send_signal(signal.SIGSTOP)
    wait_for(
        "a step after the restart", lambda: any(m["time"] > stopped and m.get("run/restarts") for m in metrics(run.path)), 90
    )
    assert "is stopped" in run.output()
    run.await_completed()
    assert run.attempt == 1
    assert_same_training(run.path, undisturbed)


def test_an_agent_that_is_killed_costs_the_job_and_not_the_run(begin: Callable[..., SlurmRun], undisturbed: Path) -> None:
    run = begin("agentkilled")
    run.await_step(25)
    run.agents("n2")[0].send_signal(signal.SIGKILL)
    run.await_completed()
    assert run.causes() == ["infrastructure", "completed"]
    assert_same_training(run.path, undisturbed)


def test_the_time_limit_saves_in_time_and_the_run_goes_on(begin: Callable[..., SlurmRun]) -> None:
    run = begin(
        "limited", "cluster.time=2:00", "cluster.signal_lead_seconds=60", "train.max_steps=100000", "cluster.max_no_progress=0"
    )
    wait_for("the end of the first attempt", lambda: run.causes() == ["time_limit"], 110)
    first = run.attempt_record(1, "exit")
    assert first["saved_step"] == first["step"] > 1
    run.await_step(int(first["step"]) + 5, attempt=2)
    assert run.launch("cancel", str(run.path), **run.bed.variables).returncode == 0
    assert run.await_state("cancelled")["step"] > first["step"]
    assert run.causes() == ["time_limit", "cancelled"]
    steps = [m["trainer/step"] for m in metrics(run.path) if "train/loss" in m]
    assert steps == list(range(1, len(steps) + 1))


def test_a_mistake_of_the_user_is_not_repeated(begin: Callable[..., SlurmRun]) -> None:
    run = begin("diverged", "optim.lr=1e38")
    ended = run.await_state("failed")
    assert "not finite" in ended["message"] or "the loss is" in ended["message"]
    assert run.causes() == ["user_error"]
    wait_for("the job to end", lambda: not run.queued(), 40)
    assert run.attempt == 1
    assert status(run.path)["state"] == "failed"
