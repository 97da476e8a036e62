"""A run on two of three Slurm nodes survives every kind of interruption in turn, with the losses of an undisturbed run."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from causes import assert_attempt_named_first
from e2e_tools import last_step, losses, metrics, slow_steps, status
from forked import require_exit
from hand_made import end_of
from pace import wait_for
from slurm_tools import SETTINGS, Launch, SlurmRun, events, submit
from testbed_cluster import Testbed

pytestmark = [pytest.mark.slurm, pytest.mark.rest]

SAVE_EVERY = 4
SOAK = (
    "train.max_steps=100000",
    # A constant learning rate does not depend on max_steps, so a shorter run has the same losses.
    "optim.schedule=constant",
    f"checkpoint.save_every={SAVE_EVERY}",
    "cluster.time=20:00",
    "cluster.signal_lead_seconds=10",
    "cluster.stall_seconds=6",
    "cluster.max_restarts=1",
    "cluster.exclude_bad_nodes=true",
)
LATE = 300
# Must be less than the 300 s timeout of the rendezvous and of collectives; about 15 s on an idle machine.
AGAIN_WITHIN_S = 180


class Soak:
    """The run and the interruptions it goes through; `attempt` is the current attempt."""

    def __init__(self, run: SlurmRun) -> None:
        self.run = run
        self.bed = run.bed
        self.attempt = 1
        self.causes: list[str] = []

    @property
    def nodes(self) -> list[str]:
        nodes: list[str] = self.run.attempt_record(self.attempt)["nodes"]
        return nodes

    def ended(self, cause: str, by_job: bool = True) -> dict:
        """Wait for the record of why the attempt ended, and with `by_job` also for the alert that the job sends if it can."""
        wait_for(f"the end of attempt {self.attempt}", lambda: end_of(self.run.path, self.attempt), LATE)
        record = end_of(self.run.path, self.attempt)
        assert record["cause"] == cause, f"{record}\n{self.run.output()}"
        self.causes.append(cause)
        assert self.run.causes() == self.causes
        if by_job:
            wait_for("the alert", lambda: self.alert(f"the attempt ended ({cause})"), LATE)
        return record

    def trains_in_next_attempt(self) -> None:
        """Wait until the same job has saved a new checkpoint in the next attempt."""
        job = self.run.job_of(self.attempt)
        self.attempt += 1
        self.await_steps(2)
        resumed = self.run.attempt_record(self.attempt)["resume_step"] or 0
        wait_for("a new checkpoint", lambda: self.newest_checkpoint() > resumed, LATE)
        assert self.run.attempt == self.attempt
        assert self.run.job_of(self.attempt) == job

    def goes_on_from_its_last_step(self, record: dict) -> None:
        """Check that no step was trained twice."""
        assert self.run.attempt_record(self.attempt)["resume_step"] == record["step"] == record["saved_step"]
        before = [m["trainer/step"] for m in self.steps(self.attempt - 1)]
        after = [m["trainer/step"] for m in self.steps(self.attempt)]
        assert (before[-1], after[0]) == (record["step"], record["step"] + 1)

    def steps(self, attempt: int, restarts: int = 0) -> list[dict]:
        every = [m for m in metrics(self.run.path) if "train/loss" in m]
        return [m for m in every if m["attempt"] == attempt and m["run/restarts"] >= restarts]

    def await_steps(self, count: int, restarts: int = 0) -> None:
        """Wait until the attempt has trained `count` more steps."""
        before = len(self.steps(self.attempt, restarts))
        wait_for(
            f"{count} steps of attempt {self.attempt}",
            lambda: len(self.steps(self.attempt, restarts)) >= before + count or self.require_unended(),
            LATE,
        )

    def require_unended(self) -> None:
        assert status(self.run.path)["state"] not in ("completed", "failed", "cancelled"), self.run.output()

    def newest_checkpoint(self) -> int:
        steps = [path.parent.name for path in self.run.path.glob("checkpoints/step-*/manifest.json")]
        return max((int(step.removeprefix("step-")) for step in steps), default=0)

    def alert(self, *words: str) -> str:
        """The first alert since this attempt began that contains all these words, or an empty string."""
        texts = [e["text"] for e in events(self.run.path) if e["kind"] == "alert" and e["attempt"] >= self.attempt]
        return next((text for text in texts if all(word in text for word in words)), "")

    def signal_rank(self, number: int, restarts: int, *words: str) -> None:
        """Signal the rank on the second node; check that all ranks restart in the allocation, from the newest checkpoint."""
        node, sent, saved = self.nodes[1], time.time(), self.newest_checkpoint()
        (rank,) = self.run.ranks(node)
        rank.send_signal(number)
        self.await_steps(1, restarts)
        again = self.steps(self.attempt, restarts)[0]
        every = [m for m in metrics(self.run.path) if "train/loss" in m]
        reached = max(m["trainer/step"] for m in every if (m["attempt"], m["run/restarts"]) < (self.attempt, restarts))
        assert saved < again["trainer/step"] <= reached + 1
        assert again["time"] - sent < AGAIN_WITHIN_S
        assert self.alert("all ranks are restarted", f"restart {restarts}", f"on {node}", *words), events(self.run.path)[-3:]
        assert self.run.attempt == self.attempt

    def require_named_first(self, fault: str) -> None:
        """Check that the fault is named as the cause of the previous attempt's end."""
        assert_attempt_named_first(self.run.launch, self.run.path, self.attempt - 1, fault, **self.bed.variables)

    def lose_node(self) -> None:
        """Disconnect the second node; check that the run continues without it once Slurm allocates nodes again."""
        lost = self.nodes[1]
        self.bed.cut(lost)
        wait_for("Slurm to notice", lambda: "RUNNING" not in self.run.queued(), LATE)
        wait_for("Slurm to give nodes again", lambda: self.run.queued() == "RUNNING", LATE)
        given = time.time()
        self.trains_in_next_attempt()
        assert self.steps(self.attempt)[0]["time"] - given < AGAIN_WITHIN_S
        assert lost not in self.nodes
        self.causes.append("infrastructure")
        assert self.run.causes() == self.causes
        self.require_named_first("slurm_node")
        self.bed.heal(lost)


@pytest.mark.timeout(1200)
def test_a_run_interrupted_in_every_way_has_the_losses_of_an_uninterrupted_run(
    train_here: Launch, launch_here: Launch, slurm: Testbed, runs: Path
) -> None:
    with socket.create_server(("", 0)) as taken:
        # Node names that resolve to loopback and a wrong MASTER_ADDR with a port in use must not affect the run.
        misleading = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(taken.getsockname()[1])}
        few_steps = slow_steps(1.0)
        for node in slurm.names:
            slurm.own_loopback_name(node)
        run = submit(launch_here, slurm, runs, "soak", *SOAK, "+cluster.additional_parameters.hold=''", **misleading, **few_steps)
        soak = Soak(run)
        a_node_with_other_code_is_left_out(soak)
        assert run.attempt_record(2)["address"] == slurm.layout.addresses["n1"]
        a_controller_that_restarts_changes_nothing(soak)
        soak.signal_rank(signal.SIGSTOP, 1, "is stopped")
        assert "is stopped" in run.output()
        a_job_of_a_higher_partition_takes_a_node_and_the_time_limit_saves_in_time(soak)
        an_agent_that_is_killed_costs_the_attempt(soak)
        soak.lose_node()
        slurm.run("scancel", run.job)
        run.await_end_of_job(LATE)
    # Slurm reports this state: the job may be killed before it records its own.
    assert run.shown()["state"] == "cancelled"
    assert run.attempt == soak.attempt
    assert run.causes()[: len(soak.causes)] == soak.causes
    steps = last_step(run.path)
    assert sorted(losses(run.path)) == list(range(1, steps + 1))
    here = [s for s in SETTINGS if not s.startswith(("+cluster", "cluster.", "train.max_steps", "checkpoint.save_every"))]
    alone = train_here(
        *here,
        "cluster.ranks_per_node=2",
        "optim.schedule=constant",
        f"train.max_steps={steps}",
        "checkpoint.save_every=0",
        f"run.root={runs}",
        "run.name=alone",
    )
    require_exit(alone)
    assert last_step(runs / "alone") == steps
    assert losses(run.path) == losses(runs / "alone")
    # A step that was trained more than once had the same loss each time.
    expected = losses(runs / "alone")
    assert all(m["train/loss"] == expected[m["trainer/step"]] for m in metrics(run.path) if "train/loss" in m)


def a_node_with_other_code_is_left_out(soak: Soak) -> None:
    run, bed = soak.run, soak.bed
    # Before its agent checks, n2 gets a stale copy of the code, as on a node with a broken cache.
    stale = run.path.parent / "stale"
    shutil.copytree(run.path / "code", stale)
    (stale / "launcher/errors.py").write_text((stale / "launcher/errors.py").read_text() + "\n# stale\n")
    bed.exec("n2", "mount", "--bind", stale, run.path / "code")
    bed.run("scontrol", "release", run.job)
    record = soak.ended("bad_node")
    assert soak.nodes == ["n1", "n2"]
    assert record["bad_nodes"] == ["n2"]
    bed.exec("n2", "umount", "--lazy", run.path / "code")
    soak.trains_in_next_attempt()
    assert soak.nodes == ["n1", "n3"]


def a_controller_that_restarts_changes_nothing(soak: Soak) -> None:
    soak.bed.stop_controller()
    shown = soak.run.shown()
    assert shown["state"] in ("running", "saving")
    assert "does not answer" in shown["message"]
    soak.bed.start_controller()
    soak.await_steps(5)
    assert soak.run.attempt == soak.attempt
    wait_for("Slurm to know the job again", lambda: soak.run.queued() == "RUNNING", LATE)


def a_job_of_a_higher_partition_takes_a_node_and_the_time_limit_saves_in_time(soak: Soak) -> None:
    """Slurm restarts the preempted job with a shorter time limit, raised if the limit ends before the first step.

    One of its nodes is drained meanwhile. It ends what it runs, and the attempt after that avoids it.
    """
    run, bed, (taken, drained) = soak.run, soak.bed, soak.nodes
    options = ("-p", "high", "-w", taken, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
    other = bed.output("sbatch", "--parsable", *options).strip()
    before = soak.ended("preempted")
    assert before["saved_step"] == before["step"]
    wait_for("the other job to have the node", lambda: run.queued(other) == "RUNNING", LATE)
    assert run.queued() == "PENDING"
    assert run.shown()["state"] == "pending"
    limit_min = 1
    bed.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={limit_min}")
    bed.run("scancel", other)
    soak.attempt += 1
    # Slurm itself requeues the jobs it preempts: if the launcher requeued too, the job would start twice.
    wait_for("the next attempt", lambda: run.attempt == soak.attempt and soak.nodes, LATE)
    assert drained in soak.nodes
    bed.run("scontrol", "update", f"NodeName={drained}", "State=DRAIN", "Reason=test")
    wait_for("the node to drain", lambda: bed.states()[drained].startswith("drng"), LATE)
    while True:
        record = soak.ended("time_limit")
        assert record["saved_step"] == record["step"]
        wait_for("the job to wait", lambda: run.queued() == "PENDING" or run.attempt > soak.attempt, LATE)
        done = record["step"] > before["step"]
        limit_min = 20 if done else limit_min + 1
        bed.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={limit_min}")
        if done and run.attempt == soak.attempt:
            break
        soak.attempt += 1
    assert (
        min(m["trainer/step"] for m in metrics(run.path) if m["attempt"] > soak.causes.index("time_limit")) == before["step"] + 1
    )
    soak.trains_in_next_attempt()
    soak.goes_on_from_its_last_step(record)
    assert drained not in soak.nodes
    bed.run("scontrol", "update", f"NodeName={drained}", "State=RESUME")


def an_agent_that_is_killed_costs_the_attempt(soak: Soak) -> None:
    (agent,) = soak.run.agents(soak.nodes[1])
    agent.send_signal(signal.SIGKILL)
    soak.ended("infrastructure")
    soak.trains_in_next_attempt()
    soak.require_named_first("slurm_agent")
