"""Nodes that fail, vanish, live on unseen, or were never fit: named, survived, and the same training in the end."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from e2e_tools import command_line, losses, metrics, status, wait_for
from slurm_tools import STEPS, Launch, SlurmRun, assert_same_training, submit
from testbed_cluster import Testbed

pytestmark = [pytest.mark.slurm, pytest.mark.rest]


@pytest.mark.parametrize("how", ["kill", pytest.param("cut")])
def test_a_lost_node_is_replaced(begin: Callable[..., SlurmRun], undisturbed: Path, how: str) -> None:
    run = begin(how)
    run.await_step(25)
    getattr(run.bed, how)("n2")
    wait_for("Slurm to notice", lambda: "RUNNING" not in run.queued(), 60)
    wait_for("Slurm to give nodes again", lambda: run.queued() == "RUNNING", 60)
    given = time.time()
    run.await_step(21, attempt=2)
    again = next(m["time"] for m in metrics(run.path) if m["attempt"] == 2)
    assert again - given < 60
    run.await_completed()
    assert run.causes()[-1] == "completed"
    assert run.attempt_record(2)["nodes"] != run.attempt_record(1)["nodes"]
    assert_same_training(run.path, undisturbed)


def test_a_drained_node_ends_what_it_runs(begin: Callable[..., SlurmRun], undisturbed: Path) -> None:
    run = begin("drained")
    run.await_step(25)
    run.bed.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    run.await_completed()
    assert run.causes() == ["completed"]
    assert_same_training(run.path, undisturbed)


def test_an_attempt_that_lives_on_unseen_writes_nothing_more(launch: Launch, slurm: Testbed, runs: Path) -> None:
    """One node, whose slurmd dies while its rank trains on: Slurm runs the job elsewhere, and two trainings exist."""
    run = submit(launch, slurm, runs, "orphan", "cluster.nodes=1", "train.max_steps=100000", "train.save_every=10")
    run.await_step(15)
    node = run.attempt_record(1)["nodes"][0]
    orphan = run.ranks(node)[0]
    slurm.crash(node)
    wait_for("the second attempt", lambda: run.attempt == 2, 60)
    wait_for("the orphan to end", lambda: not command_line(orphan), 60)
    taken_over = (run.path / "attempts/002").stat().st_ctime
    late = [m["trainer/step"] for m in metrics(run.path) if m["attempt"] == 1 and m["time"] > taken_over + 2]
    assert not late
    run.await_step(int(run.attempt_record(2)["resume_step"]) + 12, attempt=2)
    assert status(run.path)["attempt"] == 2
    steps = [m for m in metrics(run.path) if "train/loss" in m]
    twice = {m["trainer/step"]: m["train/loss"] for m in steps if m["attempt"] == 1}
    assert all(twice.get(m["trainer/step"], m["train/loss"]) == m["train/loss"] for m in steps if m["attempt"] == 2)
    manifests = [json.loads(p.read_text()) for p in run.path.glob("checkpoints/step-*/manifest.json")]
    assert all(m["attempt"] == 2 for m in manifests if m["step"] > run.attempt_record(2)["resume_step"])
    assert launch("cancel", str(run.path), "--no-save", **slurm.variables).returncode == 0


def test_a_controller_that_restarts_changes_nothing(begin: Callable[..., SlurmRun], undisturbed: Path) -> None:
    run = begin("controller")
    run.await_step(25)
    run.bed.stop_controller()
    shown = run.shown()
    assert shown["state"] in ("running", "saving")
    assert "does not answer" in shown["message"]
    run.bed.start_controller()
    run.await_completed()
    assert run.causes() == ["completed"]
    assert_same_training(run.path, undisturbed)


def test_a_run_directory_that_a_node_does_not_see_names_the_node(
    launch: Launch, slurm: Testbed, runs: Path, undisturbed: Path
) -> None:
    runs.mkdir()
    slurm.private_mount("n2", runs)
    run = submit(launch, slurm, runs, "unshared")
    ended = run.await_state("failed", deadline_s=120)
    assert "n2" in ended["message"]
    assert "run directory" in ended["message"]
    assert "cluster.exclude_bad_nodes" in ended["message"]
    assert run.causes() == ["bad_node"]
    assert run.attempt_record(1, "exit")["bad_nodes"] == ["n2"]


def test_a_node_with_other_code_is_left_out(launch: Launch, slurm: Testbed, runs: Path, undisturbed: Path) -> None:
    waiting = "+cluster.additional_parameters.begin=now+6"
    run = submit(launch, slurm, runs, "othercode", "cluster.exclude_bad_nodes=true", waiting)
    # n2 is given a stale copy of the code, as a node with a broken cache has, before its agent looks.
    stale = runs / "stale"
    subprocess.run(["cp", "-r", str(run.path / "code"), str(stale)], check=True)
    (stale / "launcher/errors.py").write_text((stale / "launcher/errors.py").read_text() + "\n# stale\n")
    pid = slurm.slurmd("n2")[0]
    subprocess.run(["nsenter", "-t", str(pid), "--mount", "mount", "--bind", str(stale), str(run.path / "code")], check=True)
    run.await_completed()
    assert run.causes() == ["bad_node", "completed"]
    assert run.attempt_record(1, "exit")["bad_nodes"] == ["n2"]
    assert run.attempt_record(2)["nodes"] == ["n1", "n3"]
    assert_same_training(run.path, undisturbed)


def test_names_that_resolve_to_loopback_and_a_taken_master_port_do_no_harm(
    begin: Callable[..., SlurmRun], slurm: Testbed, undisturbed: Path
) -> None:
    for node in ("n1", "n2"):
        slurm.own_loopback_name(node)
    with socket.create_server(("", 0)) as taken:
        run = begin("names", MASTER_ADDR="localhost", MASTER_PORT=str(taken.getsockname()[1]))
        run.await_completed()
    assert run.causes() == ["completed"]
    assert run.attempt_record(1)["address"] == slurm.layout.addresses["n1"]
    assert_same_training(run.path, undisturbed)


@pytest.fixture
def bare(other_slurm: Callable[..., AbstractContextManager[Testbed]]) -> Iterator[Testbed]:
    with other_slurm(accounting=False, nodes=2) as bed:
        yield bed


def test_a_site_without_accounting_is_enough(launch: Launch, bare: Testbed, runs: Path, undisturbed: Path) -> None:
    run = submit(launch, bare, runs, "bare")
    run.await_step(25)
    bare.run("scancel", "--signal=USR2", run.job)
    run.await_completed()
    assert run.causes() == ["preempted", "completed"]
    assert run.shown()["state"] == "completed"
    assert_same_training(run.path, undisturbed)
    lost = submit(launch, bare, runs, "gone")
    lost.await_step(5)
    bare.run("scancel", lost.job)
    wait_for("the job to end", lambda: lost.shown()["state"] == "cancelled", 40)


def test_a_rank_that_takes_too_much_memory_is_killed_and_started_again(
    launch: Launch, other_slurm: Callable[..., AbstractContextManager[Testbed]], runs: Path
) -> None:
    """Slurm kills the whole step; the run goes on in the next start of the job and says what happened."""
    with other_slurm(kill_over_memory=True, nodes=1, memory_mb=20000) as bed:
        run = submit(launch, bed, runs, "memory", "cluster.nodes=1", "cluster.mem=400M", "cluster.max_infrastructure_failures=0")
        ended = run.await_state("failed", deadline_s=90)
        assert run.causes()[-1] == "infrastructure"
        assert "memory" in ended["message"]
    assert len(losses(run.path)) < STEPS
