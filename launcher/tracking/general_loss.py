"""The loss on general text before training and at a step, from metrics.jsonl: shows whether the model has forgotten."""

from __future__ import annotations

from launcher.config.sections.evaluation import FORGETTING
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import continued_lines, iter_lines
from launcher.tracking.metrics import STEP
from launcher.tracking.verdicts import GeneralLoss

# Evaluation sets of general text; the first one that a run has is used.
GENERAL_SETS = (FORGETTING, "general")


def read_general_loss(run: RunDir, step: int) -> GeneralLoss | None:
    """Return the loss on general text before training and at the last evaluation up to `step`, or None unless both exist."""
    names = {name: f"eval/{name}/loss" for name in GENERAL_SETS}
    lines = [line for line in continued_lines(iter_lines(run.metrics, tuple(names.values()))) if line[STEP] <= step]
    for name, metric in names.items():
        losses = [(line[STEP], line[metric]) for line in lines if metric in line]
        if len(losses) > 1 and losses[0][0] == 0:
            measured_at = None if losses[-1][0] == step else losses[-1][0]
            return GeneralLoss(name, losses[0][1], losses[-1][1], measured_at)
    return None


def read_loss_before(run: RunDir, set_name: str) -> float | None:
    """Return the loss on a set before training, or None if it was not evaluated then."""
    metric = f"eval/{set_name}/loss"
    lines = continued_lines(iter_lines(run.metrics, (metric,)))
    return next((line[metric] for line in lines if line[STEP] == 0 and metric in line), None)
