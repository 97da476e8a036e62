"""The chunked loss compared with torch's cross entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from launcher.train.loss import LossHead


def head_of(bias: bool, chunk_tokens: int, dtype: torch.dtype = torch.float64) -> LossHead:
    torch.manual_seed(0)
    head = LossHead(8, 31, bias=bias, dtype=dtype)
    head.chunk_tokens = chunk_tokens
    return head


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 10, 1000])
def test_value_and_gradients_equal_cross_entropy(bias: bool, chunk_tokens: int) -> None:
    head = head_of(bias, chunk_tokens)
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    labels, factor = torch.randint(0, 31, (10,)), 0.37
    head(hidden, labels, factor).backward()
    ours = [hidden.grad.clone(), *(p.grad.clone() for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    expected = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    (expected * factor).backward()
    torch.testing.assert_close(head(hidden, labels).double(), expected, rtol=1e-6, atol=1e-6)
    # The tolerance is that of fp32, in which chunks compute for any weight dtype.
    for a, b in zip(ours, [hidden.grad, *(p.grad for p in head.parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_small_gradients_are_scaled_before_they_are_rounded() -> None:
    head = head_of(False, 4, torch.float16)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0] = 2.0
    # Each token except token 0 has the probability exp(-20): its gradient is below the smallest fp16 number.
    hidden = torch.full((1, 8), 1.25, dtype=torch.float16)
    head(hidden, torch.zeros(1, dtype=torch.long), 2.0**16).backward()
    expected = 2.0**16 * math.exp(-20) * 1.25
    torch.testing.assert_close(head.weight.grad[1:].float(), torch.full((30, 8), expected), rtol=1e-2, atol=0)


def test_no_label_gives_zero_and_zero_gradients() -> None:
    head = head_of(False, 4)
    hidden = torch.randn(0, 8, dtype=torch.float64, requires_grad=True)
    loss = head(hidden, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert not head.weight.grad.any()


def test_the_sum_does_not_depend_on_the_chunk() -> None:
    hidden, labels = torch.randn(50, 8), torch.randint(0, 31, (50,))
    sums = {head_of(False, chunk, torch.float32)(hidden, labels).item() for chunk in (1, 7, 50)}
    assert max(sums) - min(sums) < 1e-3


def test_without_gradients_only_the_value_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(False, 4)
    # addmm_ accumulates the weight gradient in a buffer as large as the weights.
    monkeypatch.setattr(torch.Tensor, "addmm_", None)
    with pytest.raises(TypeError):
        head(torch.randn(5, 8, dtype=torch.float64), torch.randint(0, 31, (5,)))
    with torch.no_grad():
        loss = head(torch.randn(5, 8, dtype=torch.float64), torch.randint(0, 31, (5,)))
    assert not loss.requires_grad
    assert loss > 0


def test_the_gradient_of_a_bf16_weight_does_not_lose_small_terms_over_chunks() -> None:
    """Each chunk adds little: a bf16 sum would lose it, while an fp32 sum is as accurate as a single product."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(2048, 8, dtype=torch.bfloat16) + 1, torch.randint(0, 31, (2048,))
    head = head_of(False, 4, torch.bfloat16)
    exact = LossHead(8, 31, bias=False, dtype=torch.float64)
    exact.weight.data.copy_(head.weight.detach())
    nn.functional.cross_entropy(exact(hidden.double()), labels, reduction="sum").backward()

    def error(gradient: torch.Tensor) -> float:
        return float((gradient.double() - exact.weight.grad).norm() / exact.weight.grad.norm())

    summed = torch.zeros_like(head.weight)
    for chunk in range(0, 2048, 4):
        head.weight.grad = None
        head(hidden[chunk : chunk + 4], labels[chunk : chunk + 4]).backward()
        summed += head.weight.grad
    head.weight.grad = None
    head(hidden, labels).backward()
    assert error(head.weight.grad) < 0.01
    assert error(summed) > 3 * error(head.weight.grad)
