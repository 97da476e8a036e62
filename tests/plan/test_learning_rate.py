"""The learning rate of each step, and the note on a rate that a resumed run changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from launcher.config.sections.train import OptimSection
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.steps import compute_learning_rate, describe_changed_rate


def rates(max_steps: int, **settings: object) -> list[float]:
    optim = OptimSection(lr=1.0, **settings)
    return [compute_learning_rate(optim, step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    assert rates(100, schedule=schedule, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_lowest_rate(schedule: str) -> None:
    lrs = rates(50, schedule=schedule, warmup_steps=5, min_lr_ratio=0.1)
    assert lrs[-1] == pytest.approx(0.1)
    assert lrs[5:] == sorted(lrs[5:], reverse=True)


def test_shapes_of_the_schedules() -> None:
    assert rates(10, schedule="constant", warmup_steps=0) == [1.0] * 10
    assert rates(11, schedule="linear", warmup_steps=0, min_lr_ratio=0.0)[5] == pytest.approx(0.5)
    assert rates(11, schedule="cosine", warmup_steps=0, min_lr_ratio=0.0)[5] == pytest.approx(0.5)
    wsd = rates(100, schedule="wsd", warmup_steps=0, decay_fraction=0.2, min_lr_ratio=0.0)
    assert wsd[:80] == [1.0] * 80
    assert wsd[80] < 1.0
    assert wsd[89] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_short_runs_have_a_rate_in_range(schedule: str, max_steps: int) -> None:
    for warmup in (0, 1, 5):
        assert all(0 < rate <= 1 for rate in rates(max_steps, schedule=schedule, warmup_steps=warmup))


@pytest.fixture
def of_steps(plan_of: Callable[..., LaunchPlan]) -> Any:
    """Return a plan of a number of steps, with settings of optim."""
    plan = plan_of()

    def change(max_steps: int | None, **optim: Any) -> LaunchPlan:
        section = plan.config.optim.model_copy(update={"lr": 1e-5, "schedule": "cosine", "warmup_steps": 0, **optim})
        config = plan.config.model_copy(update={"optim": section})
        return plan.model_copy(update={"config": config, "batch": plan.batch.model_copy(update={"max_steps": max_steps})})

    return change


def test_a_rate_that_a_longer_run_raises_is_noted(of_steps: Any) -> None:
    note = describe_changed_rate(of_steps(100), of_steps(200), 100)
    assert note is not None
    assert "after 1e-06 in step 100" in note
    assert describe_changed_rate(of_steps(100), of_steps(200, weight_decay=0.5), 100) == note, "the rate does not depend on it"


def test_a_rate_that_continues_needs_no_note(of_steps: Any) -> None:
    assert describe_changed_rate(of_steps(100), of_steps(100), 50) is None
    assert describe_changed_rate(of_steps(100, schedule="constant"), of_steps(200, schedule="constant"), 100) is None
    # Before either decay begins, wsd has the same rate.
    assert describe_changed_rate(of_steps(100, schedule="wsd"), of_steps(200, schedule="wsd"), 60) is None
    assert describe_changed_rate(of_steps(100, schedule="wsd"), of_steps(200, schedule="wsd"), 100) is not None
    assert describe_changed_rate(of_steps(100), of_steps(200), 0) is None, "nothing was trained"
    assert describe_changed_rate(of_steps(None), of_steps(200), 50) is None
    assert describe_changed_rate(of_steps(100), of_steps(50), 50) is None, "no step follows"
