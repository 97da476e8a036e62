"""The loss on general text before training and at a step, from metrics.jsonl: shows whether the model has forgotten."""

from __future__ import annotations

from launcher.config.sections.evaluation import FORGETTING
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import continued_lines, iter_lines
from launcher.tracking.metrics import STEP
from launcher.tracking.verdicts import GeneralLoss

_METRIC = f"eval/{FORGETTING}/loss"


def read_general_loss(run: RunDir, step: int) -> GeneralLoss | None:
    """Return the loss on general text before training and at the last evaluation up to `step`, or None unless both exist."""
    losses = {at: loss for at, loss in _read_losses(run).items() if at <= step}
    if 0 not in losses or len(losses) < 2:
        return None
    newest = max(losses)
    return GeneralLoss(losses[0], losses[newest], None if newest == step else newest)


def read_loss_before(run: RunDir) -> float | None:
    """Return the loss on general text before training, or None if it was not evaluated then."""
    return _read_losses(run).get(0)


def _read_losses(run: RunDir) -> dict[int, float]:
    lines = continued_lines(iter_lines(run.metrics, (_METRIC,)))
    return {line[STEP]: line[_METRIC] for line in lines if _METRIC in line}
