"""Alerts if the loss on general text rises during training: the model forgets what it knew."""

from __future__ import annotations

from launcher import run_store
from launcher.config.sections.evaluation import FORGETTING
from launcher.errors import LauncherError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.general_loss import read_loss_before
from launcher.tracking.verdicts import GeneralLoss
from launcher.train.evaluation.evaluator import Evaluation


class ForgettingCheck:
    """Compares each loss of the set eval.forgetting with the loss before training; without a run directory, does nothing."""

    def __init__(self, run: RunDir | None, plan: LaunchPlan) -> None:
        self._run = run
        self._rows = plan.eval_rows_digest(FORGETTING)
        self._before: float | None = None

    def find_rise(self, evaluation: Evaluation) -> str | None:
        """Return an alert if the loss is above the accepted one; None if it is not, or was not evaluated."""
        loss = evaluation.loss_of(FORGETTING)
        if loss is None or self._run is None:
            return None
        if evaluation.step == 0:
            self._before = loss
        elif self._before is None and self._has_first_rows(self._run):
            self._before = read_loss_before(self._run)
        if self._before is None or not GeneralLoss(self._before, loss).is_forgetting:
            return None
        rise = f"{loss:.4f}, {loss / self._before - 1:.0%} above its value before training ({self._before:.4f})"
        remedy = "lower optim.lr, train fewer steps, or add general rows to data.sources"
        return f"the model is forgetting: the loss on general text is {rise}; {remedy}"

    def _has_first_rows(self, run: RunDir) -> bool:
        """Return whether the set has the rows of the run's first attempt, whose loss before training is then comparable."""
        try:
            plans = run_store.load_plans_until(run, 0)
        except LauncherError:
            return True
        return not plans or plans[0].eval_rows_digest(FORGETTING) == self._rows
