"""Held-out loss while training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from launcher.data.loader import MicroBatch
from launcher.distributed import all_reduce_step
from launcher.train.model import CausalLMLoss
from launcher.train.monitoring.step_metrics import perplexity
from launcher.train.objectives import Objective

HELD_OUT_LOSS = "eval/held_out/loss"


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss over the atoms of the held-out rows after `step` steps, and the seconds that it took."""

    step: int
    loss: float
    num_atoms: int
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics by name, without the time."""
        return {HELD_OUT_LOSS: self.loss, "eval/held_out/ppl": perplexity(self.loss)}


class Evaluator:
    """Computes the held-out loss with the objective of training. `total_s` are the seconds of all evaluations so far."""

    def __init__(
        self,
        engine: Any,
        model: CausalLMLoss,
        objective: Objective,
        micro_batches: Sequence[MicroBatch],
        device: torch.device,
        beat: Callable[[str, int], None],
    ) -> None:
        """`micro_batches` are this rank's share of the held-out rows, equally many on every rank."""
        self._engine, self._model, self._objective = engine, model, objective
        self._micro_batches, self._device, self._beat = micro_batches, device, beat
        self.total_s = 0.0

    @torch.no_grad()
    def evaluate(self, step: int, local_stop_reason: Callable[[], str | None]) -> HeldOutLoss | None:
        """Compute the held-out loss over all ranks. Collective.

        Returns None where there are no held-out rows, or where any rank has a reason to stop before the last micro-batch.
        """
        if not self._micro_batches:
            return None
        start = time.perf_counter()
        self._model.eval()
        totals = self._sum_over_micro_batches(step, local_stop_reason)
        self._model.train()
        loss_sum, num_atoms = (0.0, 0.0) if totals is None else self._over_ranks(totals)
        seconds = time.perf_counter() - start
        self.total_s += seconds
        return None if totals is None else HeldOutLoss(step, loss_sum / max(num_atoms, 1), int(num_atoms), seconds)

    def _sum_over_micro_batches(self, step: int, local_stop_reason: Callable[[], str | None]) -> torch.Tensor | None:
        """This rank's loss and atoms, as fp64 [2]; None where the ranks stop."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        for micro in self._micro_batches:
            self._beat("evaluating", step)
            if all_reduce_step(torch.zeros(()), local_stop_reason(), [], self._device).stop_reason:
                return None
            loss = self._objective.sum_loss(self._engine, micro, self._device, scale=1.0)
            totals[0] += loss.total
            totals[1] += loss.num_atoms
        return totals

    def _over_ranks(self, totals: torch.Tensor) -> tuple[float, float]:
        dist.all_reduce(totals)
        loss_sum, num_atoms = totals.tolist()
        return loss_sum, num_atoms
