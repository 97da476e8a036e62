"""What the loop does between steps, with the engine and what surrounds it played."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.errors import DivergedError
from launcher.plan.launch_plan import LaunchPlan
from launcher.train.loop import _Session

PlanOf = Callable[..., LaunchPlan]


class Played(SimpleNamespace):
    """A session of which steps named in `skipped` are left out by DeepSpeed; keeps what is told and saved."""

    def __init__(self, plan: LaunchPlan, max_steps: int, skipped: set[int]) -> None:
        self.plan, self.max_steps, self.step, self.limit = plan, max_steps, 0, ""
        self.skipped_in_a_row, self.is_save_due = 0, False
        self.saved: list[int] = []
        self.said: list[tuple[int | None, str]] = []
        self.engine = SimpleNamespace(was_step_applied=lambda: self.step not in skipped)
        self.meter = SimpleNamespace(skipped_steps=0)
        self.tracker = SimpleNamespace(event=self._event, summary=lambda values: None)
        self.status = SimpleNamespace(state=lambda state, step: None)
        self.monitor = SimpleNamespace(loaded=lambda step: None)
        self.last_eval, self.eval_step = dict[str, float](), None

    def _event(self, kind: str, text: str, step: int | None) -> None:
        self.said.append((step, text))

    def _train_step(self, stop: Any) -> None:
        self.step += 1
        _Session._count_skipped(self)  # type: ignore[arg-type]

    def _evaluate(self, when: str, stop: Any, is_last: bool = False) -> None:
        """Takes no time."""

    def _save(self, wait: bool = False) -> None:
        self.saved.append(self.step)


def run(plan: LaunchPlan, max_steps: int, skipped: set[int]) -> Played:
    session = Played(plan, max_steps, skipped)
    _Session.run(session, lambda: None)  # type: ignore[arg-type]
    return session


def test_a_save_that_is_due_at_a_skipped_step_comes_with_the_next_one(plan_of: PlanOf) -> None:
    session = run(plan_of("checkpoint.save_every=5", "model.dtype=bf16"), 20, skipped={10, 11})
    assert session.saved == [5, 12, 15, 20]


def test_skipped_steps_are_told_but_for_those_by_which_fp16_finds_its_scale(plan_of: PlanOf) -> None:
    told = run(plan_of("model.dtype=bf16"), 10, skipped={3, 7}).said
    assert [step for step, _ in told] == [3, 7]
    assert told[1][1].startswith("gradients that are not finite: the step was left out, 2 have been so far; ")
    assert run(plan_of("model.dtype=fp16"), 10, skipped={3, 7}).said == []


def test_a_run_of_skipped_steps_ends_training(plan_of: PlanOf) -> None:
    with pytest.raises(DivergedError, match="the gradients of 4 steps in a row are not finite"):
        run(plan_of("model.dtype=bf16"), 10, skipped={3, 4, 5, 6})
