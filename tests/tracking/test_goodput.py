from __future__ import annotations

from typing import Any

import pytest

from launcher.tracking.goodput import Attempt, breakdown


def step(number: int, attempt: int, at: float, **more: float) -> dict[str, Any]:
    return {"trainer/step": number, "attempt": attempt, "time": at, "train/loss": 1.0, "time/step_s": 2.0, **more}


def test_all_time_is_told_once() -> None:
    """Ten seconds of queue and loading, four steps of which two are trained again, and an evaluation."""
    lines = [
        *(step(n, 1, 110 + 2 * n) for n in range(1, 5)),
        *(step(n, 2, 144 + 2 * n) for n in range(3, 7)),
        {"trainer/step": 6, "attempt": 2, "time": 160.0, "time/eval_s": 3.0, "ckpt/stall_s": 1.0},
    ]
    found = breakdown(lines, [Attempt(1, 0, 100.0, 120.0), Attempt(2, 2, 140.0, 165.0)], now=999.0)
    assert found.wall_s == 65
    assert (found.kept_s, found.replayed_s) == (2 * 2 + 4 * 2, 2 * 2)
    assert (found.evaluation_s, found.save_stalls_s) == (3.0, 1.0)
    assert found.waiting_s == (112 - 2 - 100) + (150 - 2 - 140)
    assert found.between_s == 20
    parts = (found.kept_s, found.replayed_s, found.evaluation_s, found.save_stalls_s, found.waiting_s, found.between_s)
    assert found.other_s == pytest.approx(65 - sum(parts))
    assert found.goodput == pytest.approx(12 / 65)


def test_a_line_stands_for_the_steps_since_the_one_before() -> None:
    lines = [step(5, 1, 110.0), step(10, 1, 120.0)]
    assert breakdown(lines, [Attempt(1, 0, 100.0, 120.0)], now=0).kept_s == 10 * 2


def test_a_run_that_goes_on_is_told_up_to_now() -> None:
    found = breakdown([step(1, 1, 105.0)], [Attempt(1, 0, 100.0, None)], now=110.0)
    assert (found.wall_s, found.kept_s, found.waiting_s, found.other_s) == (10, 2, 3, 5)
    assert breakdown([], [Attempt(1, 0, 100.0, None)], now=110.0).waiting_s == 10
    assert breakdown([], [], now=110.0).goodput == 0.0
