"""What the loop does between steps, over fake components."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.errors import DivergedError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.tracker import RateLimit
from launcher.train.loop import TrainingLoop

PlanOf = Callable[..., LaunchPlan]


class FakeLoop(TrainingLoop):
    """A loop over fake components, in which DeepSpeed skips the steps named in `skipped`; records alerts and saves."""

    def __init__(self, plan: LaunchPlan, max_steps: int, skipped: set[int], cancelled_at: int | None = None) -> None:
        self.saved: list[int] = []
        self.is_cancelled = cancelled_at is not None
        self.alerts: list[tuple[int | None, str]] = []
        tracker = SimpleNamespace(event=self._event, summary=lambda values: None)
        parts = SimpleNamespace(
            engine=SimpleNamespace(was_step_applied=lambda: self.step not in skipped),
            meter=SimpleNamespace(skipped_steps=0),
            status=SimpleNamespace(write_state=lambda state, step: None),
            monitor=SimpleNamespace(start_training=lambda step: None),
            checkpointer=SimpleNamespace(saved_step=cancelled_at or None),
            max_steps=max_steps,
        )
        run_context = SimpleNamespace(plan=plan, tracker=tracker, run_dir=RunDir(Path("run")))
        super().__init__(run_context, parts, lambda: None)  # type: ignore[arg-type]
        self.step = cancelled_at or 0

    def _event(self, kind: str, text: str, step: int | None) -> None:
        self.alerts.append((step, text))

    def is_cancelled_before_training(self) -> bool:
        return self.is_cancelled

    def train_step(self) -> None:
        self.step += 1
        self.count_skipped_step()

    def evaluate(self, when: str, is_last: bool = False) -> None:
        """Takes no time."""

    def save(self) -> None:
        self.saved.append(self.step)

    def save_and_wait(self) -> Path:
        self.saved.append(self.step)
        return Path()


def run(plan: LaunchPlan, max_steps: int, skipped: set[int]) -> FakeLoop:
    loop = FakeLoop(plan, max_steps, skipped)
    loop.run_to_end()
    return loop


@pytest.mark.parametrize(
    ("step", "newest"), [(0, "there is no checkpoint"), (5, "the newest checkpoint is of step 5")], ids=["first", "resumed"]
)
def test_a_run_that_is_cancelled_before_training_trains_no_step(plan_of: PlanOf, step: int, newest: str) -> None:
    loop = FakeLoop(plan_of("checkpoint.save_every=5"), 20, skipped=set(), cancelled_at=step)
    outcome = loop.run_to_end()
    assert (outcome.state, outcome.step, loop.step, loop.saved) == ("cancelled", step, step, [])
    assert outcome.message == f"stopped before training had begun; {newest}"
    assert outcome.checkpoint == (Path(f"run/checkpoints/step-{step:08d}") if step else None)


def test_a_save_due_at_a_skipped_step_happens_at_the_next_applied_step(plan_of: PlanOf) -> None:
    loop = run(plan_of("checkpoint.save_every=5", "model.dtype=bf16"), 20, skipped={10, 11})
    assert loop.saved == [5, 12, 15, 20]


def test_skipped_steps_raise_an_alert_except_in_fp16_which_finds_its_loss_scale_by_them(plan_of: PlanOf) -> None:
    alerts = run(plan_of("model.dtype=bf16"), 10, skipped={3, 7}).alerts
    assert [step for step, _ in alerts] == [3, 7]
    assert alerts[1][1].startswith("the gradients are not finite: this step was skipped, 2 so far; ")
    assert run(plan_of("model.dtype=fp16"), 10, skipped={3, 7}).alerts == []


def test_alerts_on_skipped_steps_are_of_one_kind_for_the_rate_limit(plan_of: PlanOf) -> None:
    alerts = run(plan_of("model.dtype=bf16"), 10, skipped={3, 7}).alerts
    limit = RateLimit()
    assert [limit.admit(text) for _, text in alerts] == [True, False]


def test_too_many_skipped_steps_in_a_row_end_training(plan_of: PlanOf) -> None:
    with pytest.raises(DivergedError, match="the gradients of 4 steps in a row are not finite"):
        run(plan_of("model.dtype=bf16"), 10, skipped={3, 4, 5, 6})
