"""If no rank could report a run's end to W&B, the process that started the ranks does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hand_made
import pytest
from fake_slurm import FakeSlurm, Submitted
from fake_wandb import KEY, fake_wandb
from forked import ForkingSubprocess, preloaded
from hand_made import made_verdict
from rank_tools import IMPORTED, rank

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import Attempt, Status
from launcher.tracking.jsonl import append_event
from launcher.worker import wandb_closing

pytestmark = pytest.mark.rest

REPO = Path(__file__).resolve().parents[2]
KILLED = {"rank": 1, "kind": "killed", "message": "killed by SIGKILL", "log": "rank-00001.log"}


def plan_in(folder: Path, tracking: Mapping[str, str] | None = None, **sections: Mapping[str, Any]) -> LaunchPlan:
    data = {"sources": [{"path": "train.jsonl"}]}
    made = {"model": {"path": "./model"}, "data": data, "train": {"max_steps": 40}, "tracking": dict(tracking or {}), **sections}
    return hand_made.plan(folder, made)


def begin(run: RunDir, plan: LaunchPlan) -> None:
    run.attempt(1).mkdir(parents=True)
    run_store.write_attempt(run, 1, Attempt(None))
    run.plan.write_text(plan.to_json())


def failed(run: RunDir) -> None:
    run_store.write_status(run, Status("failed", 1, 9, 40, message="rank 1: killed by SIGKILL"))
    hand_made.end(run, first_failure=KILLED)


def use(monkeypatch: pytest.MonkeyPatch, address: str, forked: bool = True) -> None:
    """Make this process and its children use a W&B server; `forked` forks them from a process that has imported wandb."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    if forked:
        monkeypatch.setattr(wandb_closing, "subprocess", ForkingSubprocess(preloaded(*IMPORTED)))


def test_a_failure_and_the_missing_steps_are_sent_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, run = plan_in(tmp_path / "run"), RunDir(tmp_path / "run")
    with fake_wandb() as server:
        with rank(plan, base_url=server.address) as it:
            it.start_and_wait()
            it.steps(1, 9)
            os.kill(it.core()["answer"], signal.SIGKILL)
            it.kill()
        assert server.run().exits == []
        failed(run)
        append_event(run, 1, "alert", "Xid 79 on GPU 3: fallen off the bus (rank 1 on n1)")
        use(monkeypatch, server.address, forked=False)
        wandb_closing.close_wandb_run(plan, run.plan, run, 1)
        assert server.run().exits == [1]
        assert server.run().steps == list(range(1, 10))
        assert server.run().summary["state"] == "failed"
        words = "the run has failed: rank 1: killed by SIGKILL (log: rank-00001.log)"
        assert [(alert["title"], alert["text"]) for alert in server.alerts] == [
            (
                "demo-run at step 9: the run has failed",
                f"{words}; GPU faults: Xid 79 on GPU 3: fallen off the bus (rank 1 on n1)",
            )
        ]


def test_a_limit_reached_between_attempts_is_sent_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, run = plan_in(tmp_path / "run"), RunDir(tmp_path / "run")
    with fake_wandb() as server:
        with rank(plan, base_url=server.address) as it:
            it.start()
            it.steps(1, 4)
            it.finish("preempted")
        hand_made.end(run, state="preempted", cause="preempted", first_failure=KILLED)
        run_store.create_attempt(run, Attempt(4, automatic=True))
        run_store.write_status(run, Status("preempted", 1, 4, 40, message="run.max_usd=100 is reached"))
        use(monkeypatch, server.address)
        wandb_closing.close_wandb_run(plan, run.plan, run, 2)
        assert (server.run().exits, server.run().summary["state"]) == ([1, 1], "preempted")
        assert server.run().steps == [1, 2, 3, 4]
        assert [alert["text"] for alert in server.alerts] == ["the run ends: run.max_usd=100 is reached"]


def test_a_failure_before_the_first_rank_is_sent_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, run = plan_in(tmp_path / "run"), RunDir(tmp_path / "run")
    begin(run, plan)
    failed(run)
    with fake_wandb() as server:
        use(monkeypatch, server.address)
        wandb_closing.close_wandb_run(plan, run.plan, run, 1)
        assert server.run().exits == [1]
        assert "the run has failed: rank 1: killed by SIGKILL" in server.alerts[0]["text"]


def test_verdicts_of_checkpoints_are_sent_when_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the run trained, its ranks held the W&B session."""
    plan, run = plan_in(tmp_path / "run", eval={"answers_every": 20}, checkpoint={"save_every": 20}), RunDir(tmp_path / "run")
    begin(run, plan)
    for step in (20, 40):
        folder = run.root / f"evaluations/step-{step:08d}"
        folder.mkdir(parents=True)
        made_verdict().write(folder)
    with fake_wandb() as server:
        use(monkeypatch, server.address)
        run_store.write_status(run, Status("running", 1, 40, 40))
        wandb_closing.close_wandb_run(plan, run.plan, run, 1)
        assert server.runs == {}
        run_store.update_status(run, state="completed")
        wandb_closing.close_wandb_run(plan, run.plan, run, 1)
        assert server.run().exits == [0]
        assert server.run().summary["verdict/step"] == 40
        assert str(server.run().summary["verdict/prompts"]).startswith("Fine-tuning helped")


def test_a_slurm_job_that_ends_for_good_closes_the_wandb_run(
    submitted: Submitted, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = submitted()
    with fake_wandb() as server:
        use(monkeypatch, server.address)
        of.begun()
        of.outcome("preempted")
        of.conclude()
        assert fake_slurm.told() == [["scontrol", "requeue", "41"]]
        assert not server.received, "it runs again"
        of.begun(2, automatic=True)
        of.failed("DataError")
        of.conclude(2)
        (run,) = server.runs.values()
        assert (run.exits, run.summary["state"]) == ([1], "failed")
        assert [alert["text"] for alert in server.alerts] == ["the run has failed: rank 3 on n1: what it said (log: /log)"]


def test_a_hanging_wandb_server_delays_the_end_by_the_deadline_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, run = plan_in(tmp_path / "run"), RunDir(tmp_path / "run")
    with fake_wandb(fault="hang") as server:
        (run.root / "wandb").mkdir(parents=True)
        begin(run, plan)
        failed(run)
        use(monkeypatch, server.address)
        monkeypatch.setattr(wandb_closing, "_DEADLINE_S", 1.0)
        began = time.monotonic()
        wandb_closing.close_wandb_run(plan, run.plan, run, 1)
        assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("state", "cause", "tracking"),
    [
        ("completed", "completed", {}),
        ("failed", "failure", {"kind": "none"}),
        # The ranks have reported these: a limit that they reached, and a stop request on this machine.
        ("preempted", "limit", {}),
        ("preempted", "preempted", {}),
    ],
)
def test_nothing_is_sent_to_wandb_where_the_ranks_reported_or_wandb_is_off(
    tmp_path: Path, state: str, cause: str, tracking: dict[str, str]
) -> None:
    plan, run = plan_in(tmp_path / "run", tracking), RunDir(tmp_path / "run")
    (run.root / "wandb").mkdir(parents=True)
    begin(run, plan)
    hand_made.record(run, 1, "TrainingEnded", state=state, reason=cause, step=1, message="")
    hand_made.end(run, state=state, cause=cause)
    run_store.write_status(run, Status(state, 1))
    wandb_closing.close_wandb_run(plan, run.plan, run, 1)
    assert not list((run.root / "wandb").iterdir())
