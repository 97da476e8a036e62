"""A run on this machine that W&B watches, a server on this machine: the Stop button, and ranks that are killed."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_tools import TINY, last_step, losses, processes_of, ranks_of, status, wait_for
from wandb_server import KEY, FakeWandb, Run, fake_wandb

from launcher.tracking.jsonl import read_events

Launch = Callable[..., subprocess.CompletedProcess[str]]
SETTINGS = (*TINY, "tracking=wandb", "train.save_every=5", "train.eval_at_start=false", "train.export=false")

pytestmark = pytest.mark.rest


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with fake_wandb() as running:
        yield running


def tracked(server: FakeWandb) -> Run:
    (run,) = server.runs.values()
    return run


def test_stop_in_the_page_saves_and_ends_all_ranks_and_the_run_can_be_resumed(
    launch: Launch, start: Callable, runs: Path, server: FakeWandb
) -> None:
    run, variables = runs / "stopped", {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address}
    with start(*SETTINGS, "train.max_steps=2000", f"run.root={runs}", "run.name=stopped", **variables) as process:
        wait_for("W&B to have a step", lambda: server.runs and tracked(server).steps)
        server.stopped = True
        output, _ = process.communicate(timeout=120)
    assert status(run)["state"] == "cancelled", output
    stopped_at = int(last_step(run))
    outcome = run / "attempts/001/outcome.json"
    assert json.loads(outcome.read_text())["checkpoint"].endswith(f"step-{stopped_at:08d}")
    # It does not wait for W&B, which may take longer than the machines have left.
    (trackers_end,) = [event["time"] for event in read_events(run / "events.jsonl") if event["kind"] == "end"]
    assert outcome.stat().st_mtime < trackers_end - 0.1
    assert not processes_of(run)
    assert tracked(server).exits == [255]

    server.stopped = False
    done = launch("resume", str(run), f"train.max_steps={stopped_at + 3}", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tracked(server).steps == list(range(1, stopped_at + 4))
    assert [row["train/loss"] for row in tracked(server).rows()] == [loss for _, loss in sorted(losses(run).items())]
    assert tracked(server).exits == [255, 0]
    assert {artifact["artifactTypeName"] for artifact in server.artifacts} == {"checkpoint"}
    assert tracked(server).config["config"]["value"]["train"]["max_steps"] == stopped_at + 3


def test_a_rank_that_is_killed_is_named_in_wandb(start: Callable, runs: Path, server: FakeWandb) -> None:
    run, variables = runs / "killed", {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address}
    with start(*SETTINGS, "train.max_steps=2000", f"run.root={runs}", "run.name=killed", **variables) as process:
        wait_for("step 8", lambda: last_step(run) >= 8)
        ranks_of(run)[1].send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
    assert status(run)["state"] == "failed"
    # The first is that of wandb-core, when rank 0 was gone.
    assert set(tracked(server).exits) == {1}
    assert tracked(server).steps == list(range(1, int(last_step(run)) + 1))
    assert tracked(server).summary["state"] == "failed"
    (alert,) = server.alerts
    assert "the run has failed: rank 1: killed by SIGKILL" in alert["text"]
    assert "rank-00001.log" in alert["text"]
    assert not processes_of(run)


def test_machines_that_are_about_to_go_are_an_alert(start: Callable, runs: Path, server: FakeWandb) -> None:
    run, variables = runs / "preempted", {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address}
    with start(*SETTINGS, "train.max_steps=2000", f"run.root={runs}", "run.name=preempted", **variables) as process:
        wait_for("step 3", lambda: last_step(run) >= 3)
        ranks_of(run)[1].send_signal(signal.SIGUSR2)
        output, _ = process.communicate(timeout=120)
    stopped_at = status(run)["step"]
    assert status(run)["state"] == "preempted", output
    words = f"the machine was asked to stop; saved at step {stopped_at} of 2000"
    assert [(event["step"], event["text"]) for event in read_events(run / "events.jsonl") if event["kind"] == "alert"] == [
        (stopped_at, words)
    ]
    title = f"preempted at step {stopped_at}: {words}"[:63]
    assert [(alert["title"], alert["text"]) for alert in server.alerts] == [(title, words)]
    assert tracked(server).preempting
    assert not processes_of(run)
