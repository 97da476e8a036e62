"""Optimizer steps that DeepSpeed skips because gradients are not finite."""

from __future__ import annotations

from launcher.errors import DivergedError
from launcher.shell_commands import launcher_command

# Consecutive steps that may be skipped. fp16 finds its loss scale by skipping; other types do not.
_MAX_IN_A_ROW = {"fp16": 20, "bf16": 3, "fp32": 3}


class SkippedSteps:
    """Counts consecutive skipped steps; the caller sets `num_in_a_row` to 0 when a step is applied."""

    def __init__(self, dtype: str, run_dir: str) -> None:
        self._dtype, self._run_dir = dtype, run_dir
        self.num_in_a_row = 0

    def count(self, step: int, num_skipped: int) -> str | None:
        """Count one skipped step; return an alert, None if skipping is usual. `num_skipped` is the run's total.

        Raises:
            DivergedError: if too many steps in a row were skipped.
        """
        self.num_in_a_row += 1
        if self.num_in_a_row > _MAX_IN_A_ROW[self._dtype]:
            raise DivergedError(
                f"the gradients of {self.num_in_a_row} steps in a row are not finite; training stopped",
                where=f"step {step}",
                remedy="lower optim.lr and go back to a good step: "
                f"{launcher_command('resume', self._run_dir, '--step', 'N', 'optim.lr=...')}",
            )
        if self._dtype == "fp16":
            return None
        # The rate limit counts alerts by the text before the colon.
        skipped = f"the gradients are not finite: this step was skipped, {num_skipped} so far"
        return f"{skipped}; check the GPUs for faults, or lower optim.lr"
