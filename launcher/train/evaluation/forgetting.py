"""Alerts if the loss on general text rises during training: the model forgets what it knew."""

from __future__ import annotations

from launcher.config.sections.evaluation import FORGETTING, EvalSection
from launcher.plan.run_dir import RunDir
from launcher.tracking.general_loss import read_loss_before
from launcher.tracking.verdicts import GeneralLoss
from launcher.train.evaluation.evaluator import Evaluation


class ForgettingCheck:
    """Compares each loss of the set eval.forgetting with the loss before training; without a run directory, does nothing."""

    def __init__(self, run: RunDir | None, section: EvalSection) -> None:
        self._run, self._max_rise = run, section.forgetting_max_rise
        self._before: float | None = None

    def find_rise(self, evaluation: Evaluation) -> str | None:
        """Return an alert if the loss is above the accepted one; None if it is not, or was not evaluated."""
        loss = evaluation.loss_of(FORGETTING)
        if loss is None or self._run is None:
            return None
        if evaluation.step == 0:
            self._before = loss
        elif self._before is None:
            self._before = read_loss_before(self._run, FORGETTING)
        if self._before is None or not GeneralLoss(FORGETTING, self._before, loss, self._max_rise).is_forgetting:
            return None
        rise = f"{loss:.4f}, {loss / self._before - 1:.0%} above its value before training ({self._before:.4f})"
        remedy = "lower optim.lr, train fewer steps, or add general rows to data.sources"
        return f"the model is forgetting: the loss on general text is {rise}; {remedy}"
