"""The evaluations of a run: which sets are due, the newest losses, and the state that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.tracker import Composite
from launcher.train.evaluation.early_stopping import EarlyStopping
from launcher.train.evaluation.evaluator import Evaluation, Evaluator, log_evaluation
from launcher.train.evaluation.forgetting import ForgettingCheck


class RunEvaluations:
    """Evaluations of one rank, across resumes. `is_missing` is true if a preemption skipped the one of the checkpoint's step."""

    def __init__(self, plan: LaunchPlan, run_dir: RunDir | None, evaluator: Evaluator, tracker: Composite) -> None:
        """`run_dir` is None on all ranks except the one that logs."""
        self._plan, self._evaluator, self._tracker = plan, evaluator, tracker
        self._newest: Evaluation | None = None
        self._forgetting = ForgettingCheck(run_dir, plan)
        best_set = plan.config.checkpoint.best_set
        self.early_stopping = EarlyStopping(plan.config.eval.stop_after, best_set, plan.eval_rows_digest(best_set))
        self.is_missing = False

    def newest(self, step: int) -> Evaluation | None:
        """Return the losses of the newest evaluation, if it was made after `step` steps."""
        return self._newest if self._newest is not None and self._newest.step == step else None

    def best_set_loss(self, step: int) -> float | None:
        """Return the loss that the checkpoint of `step` is ranked by; None if it was not evaluated."""
        newest = self.newest(step)
        return None if newest is None else newest.loss_of(self.early_stopping.set_name)

    def compute(self, step: int, scheduled_step: int, stop: Callable[[], str | None]) -> Evaluation | None:
        """Compute the losses that are due at `scheduled_step` and have not been computed after `step` steps. Collective.

        Returns None if nothing is due, or if a rank has a reason to stop.
        """
        earlier = self.newest(step)
        due = self._plan.eval_sets_at(scheduled_step)
        return self._evaluator.evaluate(
            step, stop, tuple(name for name in due if earlier is None or earlier.loss_of(name) is None)
        )

    def record(self, evaluation: Evaluation, when: str) -> None:
        """Log the losses, with an alert if the model forgets; the texts use `when` to say when the losses were computed."""
        self._newest = evaluation.joined(self.newest(evaluation.step))
        log_evaluation(evaluation, when, self._tracker, self._forgetting.find_rise)

    def state(self, step: int) -> dict[str, Any]:
        """Return the state that the checkpoint of `step` stores, as JSON values."""
        return {"early_stopping": self.early_stopping.state(), "is_evaluated": self.newest(step) is not None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state that a checkpoint stores."""
        self.early_stopping.restore(state.get("early_stopping"))
        self.is_missing = state.get("is_evaluated") is False
