"""Unusual nodes and sites: a disconnected node, a node without the run directory, no accounting, a memory limit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from causes import CAUSES, assert_run_named_first
from e2e_tools import command_line, last_step, losses, metrics, slow_steps, status
from forked import require_exit
from hand_made import end_of
from pace import wait_for
from slurm_tools import Launch, submit
from testbed_cluster import Testbed

# Starting ranks takes many times longer on a busy machine.
pytestmark = [pytest.mark.slurm, pytest.mark.rest, pytest.mark.timeout(900)]

ENDLESS = "train.max_steps=100000"


def test_an_attempt_on_a_disconnected_node_writes_nothing_more(launch_here: Launch, slurm: Testbed, runs: Path) -> None:
    """The node's slurmd dies while its rank still trains. Slurm runs the job elsewhere, so two processes train the run."""
    once = ("cluster.nodes=1", "cluster.max_restarts=2", ENDLESS, "checkpoint.save_every=4")
    run = submit(launch_here, slurm, runs, "orphan", *once)
    run.await_step(6)
    node = run.attempt_record(1)["nodes"][0]
    orphan = run.ranks(node)[0]
    slurm.crash(node)
    wait_for("the second attempt", lambda: run.attempt == 2, 90)
    wait_for("the orphan to end", lambda: not command_line(orphan), 60)
    log = (run.path / "attempts/001/rank-00000.log").read_text()
    assert log.count("attempt 1 is superseded: attempt 2 has taken over") == 1, "the orphan's agent did not start it again"
    taken_over = (run.path / "attempts/002").stat().st_ctime
    late = [m["trainer/step"] for m in metrics(run.path) if m["attempt"] == 1 and m["time"] > taken_over + 2]
    assert not late
    run.await_step(int(run.attempt_record(2)["resume_step"]) + 5, attempt=2)
    assert status(run.path)["attempt"] == 2
    steps = [m for m in metrics(run.path) if "train/loss" in m]
    twice = {m["trainer/step"]: m["train/loss"] for m in steps if m["attempt"] == 1}
    assert all(twice.get(m["trainer/step"], m["train/loss"]) == m["train/loss"] for m in steps if m["attempt"] == 2)
    manifests = [json.loads(p.read_text()) for p in run.path.glob("checkpoints/step-*/manifest.json")]
    assert all(m["attempt"] == 2 for m in manifests if m["step"] > run.attempt_record(2)["resume_step"])
    assert launch_here("cancel", str(run.path), "--no-save", **slurm.variables).returncode == 0
    run.await_end_of_job()
    # Slurm reports this state: the job may be killed before it writes its own.
    assert run.shown()["state"] == "cancelled"
    assert run.attempt == 2


def test_a_node_that_does_not_see_the_run_directory_is_named(launch_here: Launch, slurm: Testbed, runs: Path) -> None:
    runs.mkdir()
    slurm.private_mount("n2", runs)
    run = submit(launch_here, slurm, runs, "unshared")
    final = run.await_state("failed")
    assert "n2" in final["message"]
    assert "run directory" in final["message"]
    assert "cluster.exclude_bad_nodes" in final["message"]
    assert run.causes() == ["bad_node"]
    assert end_of(run.path, 1)["bad_nodes"] == ["n2"]


def test_a_run_works_without_slurm_accounting(
    launch_here: Launch, other_slurm: Callable[..., AbstractContextManager[Testbed]], runs: Path
) -> None:
    with other_slurm(accounting=False, nodes=1) as bare:
        run = submit(launch_here, bare, runs, "bare", "cluster.nodes=1", ENDLESS)

        def resume(*overrides: str) -> None:
            done = launch_here("resume", str(run.path), *overrides, **bare.variables, **slow_steps())
            require_exit(done)

        run.await_step(5)
        run.kill_batch_script()
        wait_for("the job to end", lambda: run.shown()["state"] == "failed", 60)
        assert_run_named_first(launch_here, run.path, "slurm_batch_script", alert="", **bare.variables)
        # The next two attempts end as soon as their agent runs, which saves most of what a start costs.
        resume()
        wait_for("its agent", lambda: run.attempt_record(2)["job"] and run.agents("n1"), 120)
        bare.run("scancel", run.job)
        wait_for("the job to end", lambda: run.shown()["state"] == "cancelled", 60)
        run.await_end_of_job()
        steps = last_step(run.path) + 3
        resume(f"train.max_steps={steps}")
        wait_for("its agent", lambda: run.attempt_record(3)["job"] and run.agents("n1"), 120)
        bare.run("scontrol", "requeue", run.job)
        wait_for("the next start", lambda: run.attempt == 4, 120)
        # An agent that handles Slurm's SIGTERM before the SIGKILL leaves a record.
        requeued = end_of(run.path, 3)
        assert requeued["cause"] == "preempted"
        assert re.fullmatch(f"{CAUSES['slurm_requeue']}|stopped before training had begun", requeued["message"])
        run.await_completed()
        assert run.causes()[-1] == "completed"
        assert run.attempt == 4
        assert run.shown()["state"] == "completed"
    assert sorted(losses(run.path)) == list(range(1, steps + 1))


def test_a_rank_over_its_memory_limit_is_killed_and_restarted(
    launch_here: Launch, other_slurm: Callable[..., AbstractContextManager[Testbed]], runs: Path
) -> None:
    """Slurm kills the whole job step; the run continues when the job next starts, and reports what happened."""
    with other_slurm(kill_over_memory=True, nodes=1, memory_mb=20000) as bed:
        # Slurm samples memory only every few seconds, so the run must last longer than that.
        limits = (
            "cluster.nodes=1",
            "cluster.additional_parameters.mem=400M",
            "cluster.max_infrastructure_failures=0",
            "train.max_steps=100000",
        )
        run = submit(launch_here, bed, runs, "memory", *limits)
        final = run.await_state("failed")
        assert run.causes()[-1] == "infrastructure"
        assert "memory" in final["message"]
    assert len(losses(run.path)) < 100000
