"""Summed negative log-likelihood, with logits only for trained tokens and only a chunk at a time.

The forward pass computes the gradient with respect to the head's input and weight, chunk by chunk, as in Liger's fused linear
cross-entropy (Hsu et al. 2024, arXiv:2410.10989). Logits are computed once, not again in the backward pass, and the full
[tokens, vocab] matrix never exists. The gradient of the weight is summed over chunks in fp32, because a sum in bf16 would lose
anything smaller than 1/256 of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# Rows of the head's weight whose gradient is computed at a time on devices that cannot accumulate products in fp32.
_ROWS = 1024


class LossHead(nn.Linear):
    """A language-model head whose forward takes labels and returns their loss.

    It remains a module, so ZeRO-3's hooks gather and release its weight around the call.
    """

    chunk_tokens: int = 1024

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, factor: float | Tensor = 1.0, per_token: bool = False
    ) -> Tensor:
        """Return the summed loss of `hidden` [N, H] and `labels` [N], an fp32 scalar; without labels, logits.

        `factor` multiplies the loss of all labels, or is fp32 [N], one factor per label, without a gradient. With `per_token`,
        return the loss of each label instead, fp32 [N], without a gradient.
        """
        if labels is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        if not per_token:
            # Inside an autograd function, gradients are always off.
            wants_grad = torch.is_grad_enabled()
            return _ChunkedNll.apply(hidden, self.weight, self.bias, labels, factor, self.chunk_tokens, wants_grad)
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        with torch.no_grad():
            for start in range(0, len(hidden), self.chunk_tokens):
                chunk = slice(start, start + self.chunk_tokens)
                losses[chunk], _, _ = _token_nll(_fp32_logits(hidden[chunk], self.weight, self.bias), labels[chunk, None])
        return losses


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        factor: float | Tensor,
        chunk_tokens: int,
        wants_grad: bool,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = wants_grad and any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = _WeightGradient(weight, is_single_chunk=len(hidden) <= chunk_tokens) if needs_grad else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_grad and bias is not None else None
        for start in range(0, len(hidden), chunk_tokens):
            part, target = hidden[start : start + chunk_tokens], labels[start : start + chunk_tokens]
            logits, index = _fp32_logits(part, weight, bias), target.unsqueeze(-1)
            losses, exponentials, sums = _token_nll(logits, index)
            scale = factor[start : start + chunk_tokens, None] if isinstance(factor, Tensor) else factor
            total += (losses.unsqueeze(-1) * scale).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d nll / d logits = softmax - onehot, written over the logits.
            exponentials.scatter_add_(-1, index, sums.neg())
            # Scale in fp32: the weights' type would round the factor and small gradients.
            grad = exponentials.mul_(scale / sums).to(weight.dtype)
            del logits, exponentials
            torch.mm(grad, weight, out=grad_hidden[start : start + len(part)])
            grad_weight.add(grad, part)
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
            # Free it before the next chunk's logits are computed.
            del grad
        if grad_weight is not None:
            bias_result = None if grad_bias is None else grad_bias.to(weight.dtype)
            ctx.save_for_backward(grad_hidden, grad_weight.result(), bias_result)
        return total

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


class _WeightGradient:
    """Sums the gradient of the head's weight over chunks; in fp32 if there are several chunks."""

    def __init__(self, weight: Tensor, is_single_chunk: bool) -> None:
        self._dtype = weight.dtype
        self._is_wide = weight.dtype.itemsize >= torch.float32.itemsize
        dtype = weight.dtype if is_single_chunk or self._is_wide else torch.float32
        self._sum = torch.zeros_like(weight, dtype=dtype)

    def add(self, grad: Tensor, part: Tensor) -> None:
        """Add grad^T part: `grad` [C, V] is the gradient of a chunk's logits, `part` [C, H] its hidden states."""
        if self._sum.dtype == self._dtype:
            self._sum.addmm_(grad.t(), part)
        elif _has_fp32_products(part.device.type, part.dtype):
            torch.addmm(self._sum, grad.t(), part, out_dtype=torch.float32, out=self._sum)
        else:
            for start in range(0, len(self._sum), _ROWS):
                self._sum[start : start + _ROWS] += torch.mm(grad[:, start : start + _ROWS].t(), part)

    def result(self) -> Tensor:
        """Return the sum in the weight's type, and release it here."""
        total = self._sum
        del self._sum
        return total.to(self._dtype)


def _fp32_logits(part: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits of hidden states [C, H] in fp32; if the device can, without rounding them to the weights' type first."""
    if not _has_fp32_products(part.device.type, part.dtype):
        return nn.functional.linear(part, weight, bias).float()
    logits = torch.mm(part, weight.t(), out_dtype=torch.float32)
    return logits if bias is None else logits.add_(bias)


def _token_nll(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's loss [C], exp(logits - maximum), which overwrites the logits, and its sums [C, 1].

    In place, because torch.logsumexp makes a copy of the logits.
    """
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    targets = logits.gather(-1, index)
    sums = logits.exp_().sum(dim=-1, keepdim=True)
    return (sums.log() - targets).squeeze(-1), logits, sums


@cache
def _has_fp32_products(device: str, dtype: torch.dtype) -> bool:
    """Return whether the device can accumulate matrix products in `dtype` in fp32: torch's `out_dtype`.

    CPUs cannot, and some versions of torch cannot add to a sum of another type.
    """
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
        product = torch.mm(ones, ones, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all()) and bool((product == 16).all())
