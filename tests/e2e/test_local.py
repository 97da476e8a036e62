"""A local run ends on two Ctrl-C, a non-finite loss, a killed agent, a second attempt, or an unexpected error.

tests/e2e/test_resume_exact.py stops and kills ranks and compares what was trained; tests/e2e/test_finish.py has a run that
completes.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, agent_of, alerts, committed, last_step, metrics, processes_of, ranks_of, status
from pace import wait_for

from launcher import run_store
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt

pytestmark = pytest.mark.rest

Launch = Callable[..., subprocess.CompletedProcess[str]]

SETTINGS = (*TINY, "eval.at_start=false", "export.enabled=false", "train.max_steps=100000")


def test_two_interrupts_a_non_finite_loss_and_a_killed_agent_end_a_run(
    launch: Launch, launch_here: Launch, start: Callable, runs: Path
) -> None:
    """Three attempts of one run, each of which ends in a different way."""
    run = runs / "disturbed"
    with start(
        *SETTINGS, "checkpoint.save_every=1", "checkpoint.keep_last=3", f"run.root={runs}", "run.name=disturbed"
    ) as process:
        wait_for("three checkpoints", lambda: last_step(run) >= 4)
        # A suspended rank never completes its step, so only the kill can end this run.
        ranks_of(run)[1].send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        wait_for("the first signal to arrive", lambda: "saving" in (process.stdout.readline() if process.stdout else ""))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert "killed" in status(run)["message"]
    assert not processes_of(run)

    bad = launch("resume", str(run), "checkpoint.save_every=0", "optim.lr=1e38")
    assert bad.returncode == 1
    assert "not finite" in bad.stderr or "the loss is nan" in bad.stderr
    assert "optim.lr" in bad.stderr
    assert "Traceback" not in bad.stderr
    good = [name for name in committed(run) if name.startswith("step-")]
    assert all((run / "checkpoints" / name / "manifest.json").is_file() for name in good)
    assert status(run)["state"] == "failed"
    failed = [text for text in alerts(run) if re.match("the attempt failed: rank [01]: .*(the loss is nan|not finite)", text)]
    assert len(failed) == 1, alerts(run)

    assert len(good) >= 2
    before = int(good[0].removeprefix("step-"))
    with start("resume", str(run), "--step", str(before), "optim.lr=3e-5") as process:
        wait_for("steps of the third attempt", lambda: len([m for m in metrics(run) if m["attempt"] == 3]) >= 3)
        agent_of(run).kill()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "set aside" in output
    assert "agent" in output
    wait_for("the ranks to end", lambda: not processes_of(run), deadline_s=20)
    assert "failed" in launch_here("status", str(run)).stdout
    trained = [line for line in metrics(run) if line["attempt"] == 3 and "train/loss" in line]
    assert [line["trainer/step"] for line in trained] == list(range(before + 1, before + 1 + len(trained)))
    assert all(line["train/loss"] < 10.9 and line["train/skipped_steps"] == 0 for line in trained)


def test_a_superseded_attempt_ends_and_is_not_restarted(start: Callable, runs: Path) -> None:
    run = runs / "followed"
    with start(*SETTINGS, "cluster.max_restarts=2", f"run.root={runs}", "run.name=followed") as process:
        wait_for("a step", lambda: last_step(run) >= 1)
        run_store.create_attempt(RunDir(run), Attempt(resume_step=None))
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 1, output
    assert "attempt 1 is superseded: attempt 2 has taken over" in output
    # Rank 0 notices the new attempt; rank 1 may be killed before it can write its own record.
    starts = {path.name.partition("-rank-")[0] for path in (run / "attempts/001/elastic").glob("node-*/start-*")}
    assert starts == {"start-001"}, "started once"
    assert not processes_of(run)


def test_an_unexpected_error_shows_its_traceback(launch: Launch, runs: Path) -> None:
    done = launch(*SETTINGS, "model.config.hidden_act=nonsense", f"run.root={runs}", "run.name=unforeseen")
    assert done.returncode == 1
    assert "KeyError: 'nonsense'" in done.stderr
    assert 'activations.py", line' in done.stderr, "where it was raised"
    assert "rank 0 failed first" in done.stderr or "rank 1 failed first" in done.stderr
    assert "attempts/001/rank-0000" in done.stderr
    assert not processes_of(runs / "unforeseen")


def test_a_refused_run_leaves_no_directory(launch_here: Launch, runs: Path) -> None:
    for override in ("train.global_batch_size=7", "data.sources=[{path: ./nowhere.jsonl}]", "cluster.nodes=2", "optim.lr=-1"):
        done = launch_here(*TINY, override, f"run.root={runs}", "run.name=refused")
        assert done.returncode == 2, override
        assert "Traceback" not in done.stderr
    assert not runs.exists()
