from __future__ import annotations

import torch
from torch import nn

from launcher.config.sections.deepspeed import DeepSpeedSection
from launcher.config.sections.train import OptimSection
from launcher.train.optim import build_optimizer, set_learning_rate


def test_one_dimensional_weights_are_not_decayed() -> None:
    layer = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(layer.parameters(), OptimSection(weight_decay=0.1), DeepSpeedSection())
    by_decay = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.param_groups}
    assert by_decay == {0.1: [2], 0.0: [1, 1, 1]}
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert isinstance(optimizer, torch.optim.AdamW)
