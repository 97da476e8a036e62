"""The loss on general text before training and at a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.evaluate.verdict import describe_general_loss
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import JsonlTracker
from launcher.tracking.run_metrics import read_general_loss


def evaluated(folder: Path, losses: dict[int, float]) -> RunDir:
    run = RunDir(folder)
    log = JsonlTracker(run, 1)
    for step, loss in losses.items():
        log.log(step, {"eval/forgetting/loss": loss, "train/loss": 1.0})
    return run


def test_the_last_evaluation_up_to_the_step_counts(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {0: 2.0, 10: 2.05, 20: 2.3, 30: 9.0})
    at_20, at_15 = read_general_loss(run, 20), read_general_loss(run, 15)
    assert at_20 is not None
    assert at_15 is not None
    assert (at_20.before, at_20.after, at_20.is_forgetting) == (2.0, 2.3, True)
    assert (at_15.after, at_15.is_forgetting) == (2.05, False)
    assert (at_20.measured_at, at_15.measured_at) == (None, 10)
    assert "until step 10, where it was measured last: no sign of forgetting" in describe_general_loss(at_15)
    assert "step" not in describe_general_loss(at_20)


@pytest.mark.parametrize("losses", [{0: 2.0}, {10: 2.0, 20: 2.1}, {}])
def test_without_a_loss_before_and_after_there_is_none(tmp_path: Path, losses: dict[int, float]) -> None:
    assert read_general_loss(evaluated(tmp_path, losses), 20) is None
