"""Save times read from a run's metrics."""

from __future__ import annotations

from typing import Any

from saving import Saves, measured_saves


def step(number: int, time: float, seconds: float) -> dict[str, Any]:
    return {"trainer/step": number, "time": time, "time/step_s": seconds, "train/loss": 1.0}


def save(last_step: int, time: float, seconds: float, stall_s: float) -> dict[str, Any]:
    figures = {"ckpt/last_step": last_step, "ckpt/save_s": seconds, "ckpt/stall_s": stall_s, "ckpt/bytes": 10}
    return {"trainer/step": last_step + 1, "time": time, **figures}


def test_steps_beside_a_write_are_told_from_others_and_the_first_save_is_left_out() -> None:
    lines = [
        *(step(1, 10, 5), step(2, 12, 2), step(3, 14, 2)),
        # Saved after step 3, written during step 4.
        *(step(4, 17, 3), save(3, 17, 2.5, 0.9), step(5, 19, 2)),
        # Saved after step 5, written until the middle of step 7.
        *(step(6, 23, 4), step(7, 26, 3), save(5, 26, 5.0, 0.1), step(8, 28, 2)),
        save(8, 29, 1.5, 1.5),
    ]
    assert measured_saves(lines) == Saves(
        alone=[2, 2, 2], beside=[4, 3], stalls=[0.1], background=[5.0], waited=1.5, num_bytes=10
    )
