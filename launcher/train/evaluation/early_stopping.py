"""Stop training when an evaluation set stops improving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class EarlyStopping:
    """Counts evaluations in a row whose loss is not below the lowest one so far.

    `patience` is eval.stop_after: that many of them end training; 0 never does.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_loss = math.inf
        self.best_step = 0
        self.num_without_improvement = 0

    @property
    def is_due(self) -> bool:
        """True where training should end."""
        return 0 < self.patience <= self.num_without_improvement

    @property
    def message(self) -> str:
        """Why training ended."""
        return (
            f"{self.num_without_improvement} evaluations in a row were not below {self.best_loss:.4f}, the loss at step "
            f"{self.best_step} (eval.stop_after)"
        )

    def record(self, step: int, loss: float) -> None:
        """Take the loss of an evaluation at `step` into account."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.num_without_improvement = loss, step, 0
        else:
            self.num_without_improvement += 1

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"best_loss": best, "best_step": self.best_step, "num_without_improvement": self.num_without_improvement}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take over the state that a checkpoint has kept; None for a checkpoint without one."""
        if state is not None:
            self.best_loss = math.inf if state["best_loss"] is None else float(state["best_loss"])
            self.best_step, self.num_without_improvement = int(state["best_step"]), int(state["num_without_improvement"])
