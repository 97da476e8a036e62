"""Builders for the optimizers in launcher/plan/optimizers.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from launcher.config.sections.train import DeepSpeedSection, OptimSection
from launcher.plan.optimizers import OPTIMIZERS

# Builds an optimizer for parameter groups, each with its `weight_decay`; the loop sets the learning rate before each step.
Builder = Callable[[list[dict[str, Any]], OptimSection, DeepSpeedSection], torch.optim.Optimizer]


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
