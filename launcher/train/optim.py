"""Builders for the optimizers in launcher/plan/optimizers.py, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from launcher.config.schema import DeepSpeedSection, OptimSection
from launcher.plan.optimizers import OPTIMIZERS

# Builds an optimizer for parameter groups, each with its `weight_decay`; the loop sets the learning rate before each step.
Builder = Callable[[list[dict[str, Any]], OptimSection, DeepSpeedSection], torch.optim.Optimizer]


def compute_learning_rate(optim: OptimSection, step: int, max_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule down to min_lr_ratio.

    wsd holds the peak and decays linearly over the last `decay_fraction` of all steps
    (Hu et al. 2024, arXiv:2404.06395).
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    last = max(max_steps - 1, optim.warmup_steps)
    if optim.schedule == "wsd":
        start = max(optim.warmup_steps, round(max_steps * (1 - optim.decay_fraction)) - 1)
    else:
        start = optim.warmup_steps
    done = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape)


def build_optimizer(
    parameters: Iterable[nn.Parameter], optim: OptimSection, deepspeed: DeepSpeedSection
) -> torch.optim.Optimizer:
    """Build the optimizer that `optim.name` names in OPTIMIZERS, over two groups: with and without weight decay."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        # Under ZeRO-3 a parameter is empty between uses; ds_shape keeps its full shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    build: Builder = resolve_name(OPTIMIZERS[optim.name].builder)
    return build([group for group in groups if group["params"]], optim, deepspeed)


def build_adamw(groups: list[dict[str, Any]], optim: OptimSection, deepspeed: DeepSpeedSection) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    torch's fused kernel works on GPU and CPU and needs no compiler. DeepSpeed's CPU Adam steps offloaded states and overlaps
    the copies.
    """
    if deepspeed.offload_optimizer != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
