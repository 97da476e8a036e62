from __future__ import annotations

import pytest
import torch
from torch import nn

from launcher.config.schema import DeepSpeedSection, OptimSection
from launcher.train.optim import build_optimizer, compute_learning_rate, set_learning_rate


def rates(max_steps: int, **settings: object) -> list[float]:
    optim = OptimSection(lr=1.0, **settings)
    return [compute_learning_rate(optim, step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    assert rates(100, schedule=schedule, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_lowest_rate(schedule: str) -> None:
    lrs = rates(50, schedule=schedule, warmup_steps=5, min_lr_ratio=0.1)
    assert lrs[-1] == pytest.approx(0.1)
    assert lrs[5:] == sorted(lrs[5:], reverse=True)


def test_shapes_of_the_schedules() -> None:
    assert rates(10, schedule="constant", warmup_steps=0) == [1.0] * 10
    assert rates(11, schedule="linear", warmup_steps=0, min_lr_ratio=0.0)[5] == pytest.approx(0.5)
    assert rates(11, schedule="cosine", warmup_steps=0, min_lr_ratio=0.0)[5] == pytest.approx(0.5)
    wsd = rates(100, schedule="wsd", warmup_steps=0, decay_fraction=0.2, min_lr_ratio=0.0)
    assert wsd[:80] == [1.0] * 80
    assert wsd[80] < 1.0
    assert wsd[89] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_short_runs_have_a_rate_in_range(schedule: str, max_steps: int) -> None:
    for warmup in (0, 1, 5):
        assert all(0 < rate <= 1 for rate in rates(max_steps, schedule=schedule, warmup_steps=warmup))


def test_one_dimensional_weights_are_not_decayed() -> None:
    layer = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(layer.parameters(), OptimSection(weight_decay=0.1), DeepSpeedSection())
    by_decay = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.param_groups}
    assert by_decay == {0.1: [2], 0.0: [1, 1, 1]}
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert isinstance(optimizer, torch.optim.AdamW)
