from __future__ import annotations

import math
import time

import torch

from launcher.train.metrics import StepTimer, perplexity


def test_parts_of_a_step_add_up_and_start_afresh() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.begin()
    for _ in range(2):
        with timer.part("fwd_bwd"):
            time.sleep(0.02)
    times = timer.read()
    assert 0.04 <= times["time/fwd_bwd_s"] <= times["time/step_s"]
    timer.begin()
    assert timer.read().keys() == {"time/step_s"}


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(0.0) == 1.0
    assert math.isinf(perplexity(1e6))
