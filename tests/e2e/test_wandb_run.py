"""A local run tracked by a local W&B server, with the Stop button, a preemption and a killed rank."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from causes import CAUSES, assert_run_named_first
from e2e_tools import TINY, last_step, losses, processes_of, ranks_of, slow_steps, status
from fake_wandb import KEY, FakeWandb, Run, fake_wandb
from forked import Launch
from pace import wait_for

from launcher.plan.run_dir import RunDir
from launcher.runs import journal
from launcher.tracking.jsonl import read_events

SETTINGS = (*TINY, "tracking=wandb", "checkpoint.save_every=5", "eval.at_start=false", "export.enabled=false")

pytestmark = pytest.mark.rest


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with fake_wandb() as running:
        yield running


def tracked(server: FakeWandb) -> Run:
    (run,) = server.runs.values()
    return run


def require_all_rows(server: FakeWandb, run: Path) -> None:
    """Check that W&B has each step once, with its last loss."""
    assert tracked(server).steps == list(range(1, int(last_step(run)) + 1))
    assert [row["train/loss"] for row in tracked(server).rows()] == [loss for _, loss in sorted(losses(run).items())]


# This alert may come when the machine is busy with other tests.
SLOW = "training has become slow"


def alerts(server: Any) -> list[dict[str, Any]]:
    return [alert for alert in server.alerts if SLOW not in alert["title"]]


def test_one_wandb_run_covers_a_stop_on_its_page_a_preemption_and_a_kill(
    launch_here: Launch, start_here: Callable, runs: Path, server: FakeWandb
) -> None:
    """Three attempts of one run, each of which ends in a different way."""
    run, variables = runs / "watched", {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address, **slow_steps(0.3)}
    # W&B asks only every few seconds whether somebody has pressed Stop.
    slow = slow_steps(1.0)
    with start_here(
        *SETTINGS, "train.max_steps=1000", f"run.root={runs}", "run.name=watched", **{**variables, **slow}
    ) as process:
        wait_for("W&B to have a step", lambda: server.runs and tracked(server).steps, deadline_s=120)
        server.stopped = True
        output, _ = process.communicate(timeout=120)
    assert status(run)["state"] == "cancelled", output
    stopped_at = int(last_step(run))
    outcome = journal.read_training(RunDir(run), 1)
    assert outcome is not None
    assert outcome.checkpoint.endswith(f"step-{stopped_at:08d}")
    # The attempt does not wait for W&B, which may take longer than the time left before the machines go away.
    (trackers_end,) = [event["time"] for event in read_events(run / "events.jsonl") if event["kind"] == "end"]
    assert outcome.at < trackers_end - 0.1
    assert not processes_of(run)
    assert tracked(server).exits == [255]
    assert alerts(server) == []

    # A stopped run can be resumed. A preemption sends an alert.
    server.stopped = False
    with start_here("resume", str(run), "train.max_steps=2000", **variables) as process:
        wait_for("three more steps", lambda: last_step(run) >= stopped_at + 3)
        ranks_of(run)[1].send_signal(signal.SIGUSR2)
        output, _ = process.communicate(timeout=120)
    stopped_at = status(run)["step"]
    assert status(run)["state"] == "preempted", output
    words = f"the machine was asked to stop; saved at step {stopped_at} of 2000"
    assert [
        (event["step"], event["text"])
        for event in read_events(run / "events.jsonl")
        if event["kind"] == "alert" and SLOW not in event["text"]
    ] == [(stopped_at, words)]
    title = f"watched at step {stopped_at}: {words}"[:63]
    assert [(alert["title"], alert["text"]) for alert in alerts(server)] == [(title, words)]
    assert tracked(server).preempting
    assert tracked(server).config["config"]["value"]["train"]["max_steps"] == 2000
    require_all_rows(server, run)
    assert not processes_of(run)
    num_exits = len(tracked(server).exits)

    # The alert names a killed rank.
    with start_here("resume", str(run), **variables) as process:
        wait_for("eight more steps", lambda: last_step(run) >= stopped_at + 8)
        ranks_of(run)[1].send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
    assert status(run)["state"] == "failed"
    # The first exit code comes from wandb-core, after rank 0 was gone.
    assert set(tracked(server).exits[num_exits:]) == {1}
    require_all_rows(server, run)
    assert tracked(server).summary["state"] == "failed"
    _, alert = alerts(server)
    assert re.search(f"the run has failed: {CAUSES['kill']}", alert["text"])
    assert "rank-00001.log" in alert["text"]
    assert not processes_of(run)
    assert_run_named_first(launch_here, run, "kill")
