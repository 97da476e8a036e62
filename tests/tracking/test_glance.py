from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from launcher.plan.run_dir import RunDir
from launcher.tracking.glance import Glance, Spent, glance
from launcher.tracking.jsonl import JsonlTracker


def test_a_run_that_has_logged_nothing(tmp_path: Path) -> None:
    nothing = Glance({}, (), None, None)
    assert glance(tmp_path / "metrics.jsonl") == nothing
    (tmp_path / "metrics.jsonl").touch()
    assert glance(tmp_path / "metrics.jsonl") == nothing


def test_the_newest_step_and_evaluation_count(tmp_path: Path) -> None:
    log = JsonlTracker(RunDir(tmp_path), attempt=1)
    log.log(0, {"eval/held_out/loss": 9.0})
    for step in range(1, 8):
        log.log(step, {"train/loss": 8.0 - step})
    log.log(7, {"eval/held_out/loss": 1.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"trainer/step": 8, "time": 1, "attempt": 1, "train/loss": 0.')
    seen = glance(tmp_path / "metrics.jsonl")
    assert (seen.last["trainer/step"], seen.last["train/loss"], seen.eval_loss) == (7, 1.0, 1.5)
    assert seen.losses == (7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
    assert seen.spent is None


@pytest.mark.parametrize("num_points", [1, 7, 40])
def test_losses_go_through_the_whole_run(tmp_path: Path, num_points: int) -> None:
    log = JsonlTracker(RunDir(tmp_path), attempt=1)
    for step in range(1, 2001):
        log.log(step, {"train/loss": float(step), "train/lr": 1e-5})
    losses = glance(tmp_path / "metrics.jsonl", num_points).losses
    assert len(losses) == num_points
    assert losses[0] == 1.0
    assert list(losses) == sorted(losses)
    assert losses[-1] > 2000 * (1 - 2 / num_points)


def test_a_loss_that_is_not_finite_is_one(tmp_path: Path) -> None:
    log = JsonlTracker(RunDir(tmp_path), attempt=1)
    log.log(1, {"train/loss": 2.0})
    log.log(2, {"train/loss": math.nan})
    seen = glance(tmp_path / "metrics.jsonl")
    assert math.isnan(seen.last["train/loss"])
    assert math.isnan(seen.losses[1])


def test_what_the_run_has_cost_stands_in_its_last_count(tmp_path: Path) -> None:
    log = JsonlTracker(RunDir(tmp_path), attempt=3)
    log.log(1, {"train/loss": 3.0, "cost/gpu_hours": 1.0, "cost/usd": 2.0})
    log.log(2, {"train/loss": 3.0, "cost/gpu_hours": 3.5, "cost/usd": 7.0})
    log.log(2, {"eval/held_out/loss": 3.0})
    assert glance(tmp_path / "metrics.jsonl").spent == Spent(gpu_hours=3.5, usd=7.0, at=pytest.approx(time.time(), abs=60))


def test_without_a_price_hours_are_counted(tmp_path: Path) -> None:
    JsonlTracker(RunDir(tmp_path), attempt=1).log(1, {"train/loss": 3.0, "cost/gpu_hours": 0.25})
    assert glance(tmp_path / "metrics.jsonl").spent == Spent(gpu_hours=0.25, usd=None, at=pytest.approx(time.time(), abs=60))
