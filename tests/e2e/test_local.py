"""A local run ends on two Ctrl-C, and resumes from an earlier step, where a non-finite loss ends it.

tests/e2e/test_resume_exact.py stops and kills ranks and compares what was trained; tests/e2e/test_causes.py has faults of the
machine; tests/e2e/test_finish.py has a run that completes.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, alerts, committed, last_step, metrics, processes_of, ranks_of, status
from pace import slowness, wait_for

pytestmark = pytest.mark.rest

Launch = Callable[..., subprocess.CompletedProcess[str]]

SETTINGS = (*TINY, "eval.at_start=false", "export.enabled=false", "train.max_steps=100000")


def test_two_interrupts_and_a_non_finite_loss_end_a_run(train_here: Launch, start_here: Callable, runs: Path) -> None:
    """Two attempts of one run, each of which ends in a different way."""
    run = runs / "disturbed"
    with start_here(
        *SETTINGS, "checkpoint.save_every=1", "checkpoint.keep_last=3", f"run.root={runs}", "run.name=disturbed"
    ) as process:
        wait_for("three checkpoints", lambda: last_step(run) >= 4)
        # Files that a library writes into the working directory belong to the run.
        assert {rank.cwd() for rank in ranks_of(run)} == {str(run)}
        # A suspended rank never completes its step, so only the kill can end this run.
        ranks_of(run)[1].send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        wait_for("the first signal to arrive", lambda: "saving" in (process.stdout.readline() if process.stdout else ""))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60 * slowness())
    assert process.returncode == 130
    assert "killed" in status(run)["message"]
    assert not processes_of(run)

    *_, before, dropped = (name for name in committed(run) if name.startswith("step-"))
    step = int(before.removeprefix("step-"))
    bad = train_here("resume", str(run), "--step", str(step), "checkpoint.save_every=0", "optim.lr=1e38")
    assert bad.returncode == 1
    assert "set aside" in bad.stdout
    assert "not finite" in bad.stderr or "the loss is nan" in bad.stderr
    assert "optim.lr" in bad.stderr
    assert "Traceback" not in bad.stderr
    good = [name for name in committed(run) if name.startswith("step-")]
    assert before in good
    assert dropped not in good
    assert all((run / "checkpoints" / name / "manifest.json").is_file() for name in good)
    assert status(run)["state"] == "failed"
    failed = [text for text in alerts(run) if re.match("the attempt failed: rank [01]: .*(the loss is nan|not finite)", text)]
    assert len(failed) == 1, alerts(run)
    trained = [line["trainer/step"] for line in metrics(run) if line["attempt"] == 2 and "train/loss" in line]
    assert trained == list(range(step + 1, step + 1 + len(trained)))


def test_a_refused_run_leaves_no_directory(launch_here: Launch, runs: Path) -> None:
    for override in ("train.global_batch_size=7", "data.sources=[{path: ./nowhere.jsonl}]", "cluster.nodes=2", "optim.lr=-1"):
        done = launch_here(*TINY, override, f"run.root={runs}", "run.name=refused")
        assert done.returncode == 2, override
        assert "Traceback" not in done.stderr
    assert not runs.exists()
