"""The best values of a run and where they stood, for the summary of a run. Pure."""

from __future__ import annotations

from collections.abc import Mapping

# Metrics of which the lowest value is the best, and their names in the summary.
LOWEST = {"train/loss": "best/train_loss", "eval/held_out/loss": "best/eval_loss"}


class Best:
    """Lowest training and held-out loss, each with its step."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in what was measured at a step; what is not a number is never the best."""
        for name, best in LOWEST.items():
            if name in metrics and metrics[name] < self.values.get(best, float("inf")):
                self.values |= {best: metrics[name], f"{best}_step": step}
