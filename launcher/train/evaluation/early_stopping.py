"""Stops training when the loss of an evaluation set no longer falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from launcher.plan.quantities import format_count


class EarlyStopping:
    """Counts consecutive evaluations whose loss is not below the lowest one so far.

    `patience` is eval.stop_after: that many of them end training; with 0, none do. `set_name` and `rows_digest` identify the
    evaluated rows: counts that a checkpoint holds for other rows are ignored.
    """

    def __init__(self, patience: int, set_name: str, rows_digest: str) -> None:
        self.patience, self.set_name, self.rows_digest = patience, set_name, rows_digest
        self.best_loss = math.inf
        self.best_step = 0
        self.num_without_improvement = 0

    @property
    def is_due(self) -> bool:
        """True if training should end."""
        return 0 < self.patience <= self.num_without_improvement

    @property
    def message(self) -> str:
        """Why training ended."""
        return (
            f"eval.stop_after: the loss on {self.set_name} has not fallen below {self.best_loss:.4f} (step {self.best_step}) in "
            f"{format_count(self.num_without_improvement, 'evaluation')}"
        )

    def record(self, step: int, loss: float) -> bool:
        """Record the loss of an evaluation at `step`; return whether it is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.num_without_improvement = loss, step, 0
            return True
        self.num_without_improvement += 1
        return False

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores, as JSON values."""
        return {
            "set": self.set_name,
            "rows": self.rows_digest,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "best_step": self.best_step,
            "num_without_improvement": self.num_without_improvement,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Restore the state from a checkpoint, unless it is for other rows; None if the checkpoint has no state."""
        if state is None or state["set"] != self.set_name:
            return
        rows = str(state["rows"])
        # Earlier versions stored the digest of the training rows before that of the held-out rows.
        if self.rows_digest not in (rows, rows.rpartition("-")[2]):
            return
        self.best_loss = math.inf if state["best_loss"] is None else float(state["best_loss"])
        self.best_step, self.num_without_improvement = int(state["best_step"]), int(state["num_without_improvement"])
