"""When W&B fails, training continues at full speed, one alert is sent, and the missing data can be uploaded."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fake_wandb import KEY, FakeWandb, fake_wandb
from forked import preloaded, require_exit
from pace import slowness, wait_for
from plan_fixtures import PlanOf
from rank_tools import AT_ONCE, IMPORTED, QUICK_S, Rank, alerts, infos, rank, wait_for_another_second

from launcher.tracking.jsonl import read_events, read_metrics

pytestmark = pytest.mark.rest

# For a server that fails after it has accepted the run, and for one that does not answer from the start.
SHORT = {"FINISH_TIMEOUT_S": 2.0, "FINISH_GRACE_S": 1.0}
LIMITS = {**SHORT, "INIT_TIMEOUT_S": 1.0, "FINISH_TIMEOUT_S": 10.0, "FINISH_GRACE_S": 4.0}
LONGEST_FINISH_S = 25


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with fake_wandb() as running:
        yield running


def upload(run_dir: Path, server: FakeWandb) -> None:
    """Run the upload command that the run printed, as a user does once the server works again."""
    told = [
        event["fields"]["sync_command"] for event in read_events(run_dir / "events.jsonl") if event["fields"].get("sync_command")
    ]
    program, *arguments = shlex.split(told[-1])
    assert program == "wandb"
    environ = {**os.environ, **AT_ONCE, "WANDB_BASE_URL": server.address, "WANDB_API_KEY": KEY}
    done = preloaded(*IMPORTED).run("wandb", *arguments, env=environ)
    require_exit(done)


def kill_core(it: Rank) -> None:
    """Kill W&B's process and wait for its end: until then it may take data that it never writes."""
    core = psutil.Process(it.core()["answer"])
    core.kill()
    wait_for("W&B's process to end", lambda: not core.is_running() or core.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("fault", ["error", "hang"])
def test_a_server_that_fails_in_the_middle(make_plan: PlanOf, server: FakeWandb, run_dir: Path, fault: str) -> None:
    plan = make_plan()
    with rank(plan, base_url=server.address) as it:
        it.limits(**SHORT)
        it.start_and_wait()
        it.steps(1, 3)
        server.fault = fault
        it.steps(4, 62)
        assert it.slowest_s < QUICK_S * slowness()
        assert it.finish("completed")["seconds"] < LONGEST_FINISH_S * slowness()
    assert len(alerts(plan)) == 1
    # If the process had to be killed, it may not have written everything.
    words = "metrics.jsonl has all data; upload" if fault == "hang" else "the data is on disk; upload"
    assert any(words in text for text in alerts(plan) + infos(plan))
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 62
    server.fault = None
    server.freed.set()
    upload(run_dir, server)
    assert server.run().steps == list(range(1, 63))


@pytest.mark.parametrize("fault", ["refuse", "hang"])
def test_an_attempt_whose_server_fails_at_the_start_is_tracked_offline(
    make_plan: PlanOf, server: FakeWandb, run_dir: Path, fault: str
) -> None:
    plan, server.fault = make_plan(), fault
    with rank(plan, base_url=server.address) as it:
        it.limits(**LIMITS)
        assert it.start()["seconds"] < QUICK_S * slowness()
        it.steps(1, 20)
        it.event("alert", "the loss jumped", 20)
        assert it.slowest_s < QUICK_S * slowness()
        assert it.finish("completed")["seconds"] < LONGEST_FINISH_S * slowness()
    (warning,) = [text for text in alerts(plan) if text != "the loss jumped"]
    assert warning.startswith("this attempt is tracked offline: Weights & Biases cannot start: ")
    server.fault = None
    server.freed.set()
    upload(run_dir, server)
    assert server.run().steps == list(range(1, 21))
    assert server.run().exits == [0]
    assert "the loss jumped" in [alert["text"] for alert in server.alerts]


@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
def test_what_a_killed_wandb_process_lacks_is_sent_at_the_end(
    make_plan: PlanOf, server: FakeWandb, run_dir: Path, online: bool
) -> None:
    plan = make_plan()
    with rank(plan, key=KEY if online else None, base_url=server.address) as it:
        it.limits(FINISH_TIMEOUT_S=30.0)
        it.start_and_wait()
        it.steps(1, 9)
        if online:
            wait_for("the first rows", lambda: server.run().steps[-1:] == [8])
        else:
            first = next(run_dir.glob("wandb/offline-run-*/*.wandb"))
            size = first.stat().st_size
            wait_for("W&B to have written", lambda: first.stat().st_size > size)
        kill_core(it)
        it.steps(10, 19)
        wait_for("the alert", lambda: it.event("note", "still here") and alerts(plan))
        assert it.slowest_s < QUICK_S * slowness()
        if not online:
            wait_for_another_second(run_dir)
        it.finish("completed")
    (warning,) = alerts(plan)
    assert "W&B's process failed" in warning
    if not online:
        upload(run_dir, server)
    assert server.run().steps == list(range(1, 20))
    assert server.run().exits[-1:] == [0]


def test_an_online_attempt_sends_the_steps_of_an_offline_one(make_plan: PlanOf, server: FakeWandb, run_dir: Path) -> None:
    plan = make_plan()
    for attempt, first, last, key in ((1, 1, 6, None), (2, 5, 9, KEY), (3, 8, 12, None)):
        with rank(plan, attempt, automatic=attempt > 1, key=key, base_url=server.address) as it:
            it.start()
            it.steps(first, last)
            it.finish("completed" if attempt == 3 else "preempted")
        if attempt == 2:
            assert server.run().steps == list(range(1, 10))
        wait_for_another_second(run_dir)
    upload(run_dir, server)
    assert server.run().steps == list(range(1, 13))
