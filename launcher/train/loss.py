"""Summed negative log-likelihood, with logits only for trained tokens and only a chunk at a time.

The gradient with respect to the head's input and weight is computed in the forward pass, chunk by chunk, as
in Liger's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989): logits are computed once, not again in
the backward pass, and the full [tokens, vocab] matrix never exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LossHead(nn.Linear):
    """A language-model head whose forward takes labels and returns their loss.

    It remains a module, so that ZeRO-3's hooks gather and release its weight around the call.
    """

    chunk_tokens: int = 1024

    def forward(self, hidden: Tensor, labels: Tensor | None = None, factor: float = 1.0, per_token: bool = False) -> Tensor:
        """Return the summed loss of `hidden` [N, H] and `labels` [N], an fp32 scalar times `factor`; without labels, logits.

        `per_token` returns the loss of each label instead, fp32 [N], without a gradient.
        """
        if labels is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        if per_token:
            return self._token_losses(hidden, labels)
        # Inside an autograd function gradients are always off.
        wants_grad = torch.is_grad_enabled()
        return _ChunkedNll.apply(hidden, self.weight, self.bias, labels, factor, self.chunk_tokens, wants_grad)

    @torch.no_grad()
    def _token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            logits = nn.functional.linear(hidden[chunk], self.weight, self.bias).float()
            losses[chunk] = torch.logsumexp(logits, dim=-1) - logits.gather(-1, labels[chunk, None]).squeeze(-1)
        return losses


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        factor: float,
        chunk_tokens: int,
        wants_grad: bool,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = wants_grad and any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None
        grad_bias = torch.zeros_like(bias) if needs_grad and bias is not None else None
        for start in range(0, len(hidden), chunk_tokens):
            part, target = hidden[start : start + chunk_tokens], labels[start : start + chunk_tokens]
            logits = nn.functional.linear(part, weight, bias).float()
            log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
            index = target.unsqueeze(-1)
            total += (log_z - logits.gather(-1, index)).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d nll / d logits = softmax - onehot, written over the logits.
            grad = logits.sub_(log_z).exp_()
            grad.scatter_add_(-1, index, grad.new_full(index.shape, -1.0))
            # Scaled in fp32: in the weights' type, the factor and small gradients would be rounded.
            grad = grad.mul_(factor).to(weight.dtype)
            torch.mm(grad, weight, out=grad_hidden[start : start + len(part)])
            grad_weight.addmm_(grad.t(), part)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            # Freed before the next chunk's logits are computed.
            del logits, grad
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total * factor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            grad_hidden.mul_(scale.to(grad_hidden.dtype)),
            grad_weight.mul_(scale.to(grad_weight.dtype)),
            None if grad_bias is None else grad_bias.mul_(scale.to(grad_bias.dtype)),
            None,
            None,
            None,
            None,
        )
