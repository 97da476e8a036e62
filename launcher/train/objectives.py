"""Training objectives: how a micro-batch becomes a loss; launcher/plan/objectives.py lists them.

The loss of a global batch is the sum of an objective over its atoms (trained tokens; preference pairs), divided by their number
across ranks and accumulation steps. So the gradient depends neither on the number of ranks nor on the split into micro-batches.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from launcher.data.loader import MicroBatch, StepBatch


class Objective(Protocol):
    """Maps micro-batches to losses. It holds no state: one instance serves training and evaluation."""

    def count_atoms(self, batch: StepBatch) -> float:
        """Count the atoms of a global batch over all ranks, without communication. The loss of the step is divided by this.

        With weights, this is the sum of the atoms' weights.
        """

    def sum_loss(self, engine: Any, micro: MicroBatch, device: torch.device, scale: float) -> torch.Tensor:
        """Sum the loss over the atoms of this rank's micro-batch, times `scale`: an fp32 scalar, differentiable unless gradients
        are off.

        `engine` is the DeepSpeed engine around a launcher.train.model.CausalLMLoss. Every rank must call it equally often,
        because each call gathers weights. Called with (input_ids, position_ids) on the device, it returns logits. With labels,
        which may stay on the CPU, it returns the sum of their negative log-likelihood, times a factor or one factor per label.
        """

    def atom_losses(self, engine: Any, micro: MicroBatch, device: torch.device) -> torch.Tensor:
        """Compute the loss of each atom of this rank's micro-batch without gradients: fp32 [num_atoms], in token order.

        Every rank must call it equally often.
        """


class SupervisedNll:
    """Negative log-likelihood of the trained tokens; each trained token is an atom."""

    def count_atoms(self, batch: StepBatch) -> float:
        """Count the trained tokens of a global batch."""
        return batch.num_labels

    def sum_loss(self, engine: Any, micro: MicroBatch, device: torch.device, scale: float | torch.Tensor) -> torch.Tensor:
        """Compute logits, in chunks, only for labels that are trained; see launcher.train.loss.

        `scale` may be one factor for each label: fp32 [B, T], on the CPU.
        """
        inputs = (tensor.to(device, non_blocking=True) for tensor in (micro.input_ids, micro.position_ids))
        total: torch.Tensor = engine(*inputs, micro.labels, scale, micro.cu_seqlens)
        return total

    @torch.no_grad()
    def atom_losses(self, engine: Any, micro: MicroBatch, device: torch.device) -> torch.Tensor:
        """Return the negative log-probability of each trained token."""
        inputs = (tensor.to(device, non_blocking=True) for tensor in (micro.input_ids, micro.position_ids))
        losses: torch.Tensor = engine(*inputs, micro.labels, cu_seqlens=micro.cu_seqlens, per_token=True)
        return losses
