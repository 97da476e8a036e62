"""The alert when the loss on general text rises during training."""

from __future__ import annotations

from pathlib import Path

import hand_made
from plan_fixtures import DATA

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import JsonlTracker
from launcher.train.held_out_loss import Evaluation, ForgettingCheck, SetLoss


def evaluation(step: int, loss: float, name: str = "forgetting") -> Evaluation:
    return Evaluation(step, (SetLoss(name, loss, 100, {}),), 1.0)


def plan_of(folder: Path, rows: str = "1", **settings: object) -> LaunchPlan:
    values = {**hand_made.SETTINGS, "eval": {"forgetting": True, **settings}}
    return hand_made.plan(folder, values, eval_sets={"forgetting": DATA.model_copy(update={"digest": rows})})


def test_a_loss_far_above_that_before_training_is_an_alert(tmp_path: Path) -> None:
    check = ForgettingCheck(RunDir(tmp_path), plan_of(tmp_path))
    assert check.find_rise(evaluation(0, 2.0)) is None
    assert check.find_rise(evaluation(10, 2.09)) is None
    assert check.find_rise(evaluation(20, 9.0, "support")) is None
    alert = check.find_rise(evaluation(20, 2.5))
    assert alert is not None
    assert alert.startswith(
        "the model is forgetting: the loss on general text is 2.5000, 25% above its value before training (2.0000)"
    )


def test_after_a_resume_the_loss_before_training_is_read_from_the_metrics(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "a")
    run = hand_made.run(plan)
    assert ForgettingCheck(run, plan).find_rise(evaluation(20, 2.5)) is None
    log = JsonlTracker(run, 1)
    log.log(0, {"eval/forgetting/loss": 2.0})
    log.log(10, {"eval/forgetting/loss": 2.01})
    assert ForgettingCheck(run, plan).find_rise(evaluation(20, 2.5)) is not None
    assert ForgettingCheck(None, plan).find_rise(evaluation(20, 2.5)) is None
    other = plan_of(tmp_path / "a", rows="2")
    assert ForgettingCheck(run, other).find_rise(evaluation(20, 2.5)) is None, "the loss before training is of other rows"
