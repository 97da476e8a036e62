"""A run at its cost or time limit saves, stops by itself, and resumes with a higher limit."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, alerts, last_step, losses, metrics, processes_of, status

pytestmark = pytest.mark.rest

Launch = Callable[..., subprocess.CompletedProcess[str]]

# Starting and loading alone exceed these limits: the run stops after its first steps.
PRICE = 0.6
SETTINGS = (*TINY, "train.max_steps=100000", "eval.at_start=false", "export.enabled=false")


def require_stopped(run: Path, done: subprocess.CompletedProcess[str], words: str) -> None:
    """Check the state, message, alert and exit code of a run stopped by a limit, and that its last step was saved."""
    assert done.returncode == 130, done.stdout + done.stderr
    final = status(run)
    assert final["state"] == "preempted"
    assert re.match(words, final["message"])
    assert f"saved at step {final['step']} of" in final["message"]
    assert any(text == final["message"] for text in alerts(run))
    assert (run / f"checkpoints/step-{final['step']:08d}/manifest.json").is_file()
    assert final["step"] >= last_step(run) > 0
    assert not processes_of(run)


def test_a_run_stops_at_its_budget_and_resumes_with_a_larger_one(train_here: Launch, launch_here: Launch, runs: Path) -> None:
    run, price = runs / "bounded", f"cluster.price_per_gpu_hour={PRICE}"
    done = train_here(*SETTINGS, price, "run.max_usd=0.001", f"run.root={runs}", "run.name=bounded")
    require_stopped(run, done, r"run\.max_usd=0\.001 is reached after \d+\.\d\d GPU hours; saved")
    assert re.search(r"continue with: .* resume \S+ run\.max_usd=\.\.\.$", done.stdout, re.MULTILINE)
    stopped_at = status(run)["step"]

    refused = launch_here("resume", str(run))
    assert refused.returncode == 2
    assert "the run has used up run.max_usd" in refused.stderr
    assert f"raise it: python -m launcher resume {run} run.max_usd=..." in refused.stderr
    assert len(list((run / "attempts").iterdir())) == 1, "nothing was started"

    done = train_here("resume", str(run), "run.max_usd=1000", f"train.max_steps={stopped_at + 10}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(run)["state"] == "completed"
    last_line = [line for line in metrics(run) if "train/loss" in line and "perf/goodput" in line][-1]
    assert set(losses(run)) == set(range(1, stopped_at + 11)), "each step once"
    lost = {name: seconds for name, seconds in last_line.items() if name.startswith("lost/")}
    assert last_line["run/lost_steps"] == 0
    assert last_line["perf/goodput"] == pytest.approx(last_line["time/kept_s"] / (last_line["time/kept_s"] + sum(lost.values())))
    assert lost["lost/start_s"] > 0 < lost["lost/load_s"]
    assert lost["lost/idle_s"] > 0, "the time between the two"


def test_the_limit_of_hours_stops_a_run_during_an_evaluation(train_here: Launch, runs: Path) -> None:
    """Loading alone exceeds the limit; the limit applies once a thread has read the time that the run has used so far.

    The evaluation before the first step takes far longer than that: most of the data is held out, in micro-batches of one row.
    """
    limited = ("train.max_steps=100000", "export.enabled=false", "run.max_hours=0.0001")
    settings = (*TINY, *limited, "data.eval_fraction=0.9", "train.micro_batch_size=1")
    done = train_here(*settings, f"run.root={runs}", "run.name=evaluating")
    require_stopped(runs / "evaluating", done, r"run\.max_hours=0\.0001 is reached; saved at step \d+ of")
    assert not [line for line in metrics(runs / "evaluating") if "eval/held_out/loss" in line]
