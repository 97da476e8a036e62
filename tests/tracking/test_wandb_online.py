"""Real wandb-core with a local server: the data of a run that completes, is killed, or is stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from pace import slowness, wait_for
from rank_tools import QUICK_S, alerts, has_steps, infos, rank
from wandb_server import ENTITY, KEY, FakeWandb, fake_wandb

from launcher.plan.launch_plan import LaunchPlan

PlanMaker = Callable[..., LaunchPlan]


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with fake_wandb() as running:
        yield running
        assert not running.unknown
        assert not [request for request in running.received if KEY in request], "the key stands in no body"


@pytest.mark.rest
def test_all_metrics_alerts_and_the_summary_arrive(make_plan: PlanMaker, server: FakeWandb) -> None:
    plan = make_plan(project="demo", entity=ENTITY, group="sweep", tags=["tagged"])
    with rank(plan, base_url=server.address, imports=True, sends_at_once=False) as it:
        it.start()
        it.steps(1, 2)
        it.log(2, {"eval/held_out/loss": 1.5})
        it.event("alert", "the loss jumped", 2)
        it.steps(3, 3)
        it.summary({"last_step": 3})
        it.finish("completed")
        assert it.slowest_s < QUICK_S * slowness()
    run = server.run()
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in run.rows()]
    assert rows == [
        {"trainer/step": 1, "train/loss": 9.99, "trainer/tokens": 100},
        {"trainer/step": 2, "train/loss": 9.98, "trainer/tokens": 200, "eval/held_out/loss": 1.5},
        {"trainer/step": 3, "train/loss": 9.97, "trainer/tokens": 300},
    ]
    assert run.steps == [1, 2, 3]
    assert run.exits == [0]
    assert (run.project, run.about["groupName"], run.about["tags"]) == ("demo", "sweep", ["tagged"])
    wanted = {"best/train_loss": 9.97, "best/train_loss_step": 3, "best/eval_loss": 1.5, "best/eval_loss_step": 2}
    assert wanted.items() <= run.summary.items()
    assert {"last_step": 3, "train/loss": 9.97, "eval/held_out/loss": 1.5, "state": "completed"}.items() <= run.summary.items()
    config = {name: value["value"] for name, value in run.config.items()}
    assert config["config"]["train"]["max_steps"] == 40
    assert config["plan_digest"] == plan.digest()
    assert config["provenance"]["launcher_version"] == plan.provenance.launcher_version
    assert [(alert["title"], alert["text"], alert["severity"]) for alert in server.alerts] == [
        ("demo-run at step 2: the loss jumped", "the loss jumped", "WARN")
    ]
    assert alerts(plan) == ["the loss jumped"]
    assert any(f"see it at {server.address}/team/demo/runs/abcd1234" in text for text in infos(plan))


@pytest.mark.rest
@pytest.mark.parametrize("reached", [False, True], ids=["W&B is behind the checkpoint", "W&B is ahead of it"])
def test_after_a_crash_each_step_is_there_once(make_plan: PlanMaker, server: FakeWandb, reached: bool) -> None:
    plan, first = make_plan(), 1
    if not reached:
        with rank(plan, base_url=server.address) as it:
            it.start_and_wait()
            it.steps(1, 3)
            # W&B has every row except the last.
            it.finish("failed")
        first = 3
    with rank(plan, attempt=first, automatic=first > 1, base_url=server.address, sends_at_once=reached) as it:
        it.start_and_wait()
        it.steps(first, 3)
        it.log(3, {"eval/held_out/loss": 1.0})
        it.steps(4, 12)
        if reached:
            # W&B sends collected rows after 15 s.
            wait_for("W&B to have nearly all steps", has_steps(server, 11))
        # Kill wandb-core with its unsent data, as when the machine dies.
        os.kill(it.core()["answer"], signal.SIGKILL)
        it.kill()
    assert max(server.run().steps) >= 11 if reached else max(server.run().steps) < 8
    with rank(plan, attempt=4, automatic=True, base_url=server.address) as it:
        assert it.start()["seconds"] < 1, "nobody waits for W&B at a restart"
        # The newest checkpoint was of step 8.
        it.steps(9, 14)
        it.finish("completed")
    assert server.run().steps == list(range(1, 15))
    assert [row["train/loss"] for row in server.run().rows()] == [10.0 - step / 100 for step in range(1, 15)]
    assert {"best/eval_loss": 1.0, "best/train_loss_step": 14}.items() <= server.run().summary.items()
    assert server.run().exits == ([0] if reached else [1, 0])
    assert not alerts(plan)


def test_simultaneous_alerts_are_all_sent(make_plan: PlanMaker, server: FakeWandb) -> None:
    """W&B shortens titles, so alerts with the same title must be sent too."""
    texts = ["attempt 1 ended (failure): what it said", "the checkpoint of step 9 is damaged", *(f"{'w' * 60} {i}" for i in "12")]
    with rank(make_plan(), base_url=server.address) as it:
        it.start_and_wait()
        for text in texts:
            it.event("alert", text)
            # The shortest waitDuration in W&B is one millisecond.
            time.sleep(0.05)
        it.finish("completed")
    assert sorted(alert["text"] for alert in server.alerts) == sorted(texts)
    titles = {alert["title"] for alert in server.alerts}
    assert len(titles) == 3
    assert "demo-run: attempt 1 ended (failure)" in titles
    assert max(map(len, titles)) == 63


@pytest.mark.rest
def test_an_interrupted_evaluation_is_sent_by_the_next_attempt(make_plan: PlanMaker, server: FakeWandb) -> None:
    plan = make_plan()
    with rank(plan, base_url=server.address) as it:
        it.start_and_wait()
        it.steps(1, 4)
        it.finish("failed")
    assert server.run().steps == [1, 2, 3]
    with rank(plan, attempt=2, automatic=True, base_url=server.address) as it:
        it.start()
        it.steps(3, 4)
        it.log(4, {"eval/held_out/loss": 1.0})
        it.steps(5, 5)
        it.finish("completed")
    assert server.run().steps == [1, 2, 3, 4, 5]
    assert server.run().rows()[3].items() >= {"train/loss": 9.96, "eval/held_out/loss": 1.0}.items()
