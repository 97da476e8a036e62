from __future__ import annotations

import io

import pytest

from launcher.tracking.metrics import format_duration, format_step
from launcher.tracking.tracker import ConsoleTracker

FULL = {
    "trainer/step": 12,
    "trainer/eta_s": 100.2,
    "train/loss": 1.8342,
    "train/lr": 1.8e-5,
    "train/grad_norm": 1.318,
    "perf/tokens_per_sec": 231.4,
    "perf/mfu": 0.4,
}


def test_a_full_step_is_one_line() -> None:
    assert format_step(FULL, 40) == "step  12/40  loss 1.834  lr 1.8e-05  grad 1.32  231 tok/s  eta 1m40s"


@pytest.mark.parametrize(
    "metrics, max_steps, line",
    [
        ({"trainer/step": 3, "train/loss": 2.0}, 40, "step   3/40  loss 2.000"),
        ({"trainer/step": 3, "train/loss": 2.0}, 120000, "step      3/120000  loss 2.000"),
        ({"trainer/step": 3, "train/loss": 2.0}, None, "step   3  loss 2.000"),
        ({"train/loss": float("nan"), "trainer/eta_s": float("inf")}, 40, "loss nan  eta ?"),
        ({"perf/tokens_per_sec": 1234567.8}, 40, "1,234,568 tok/s"),
        ({}, 40, ""),
    ],
)
def test_missing_metrics_are_left_out(metrics: dict[str, float], max_steps: int | None, line: str) -> None:
    assert format_step(metrics, max_steps) == line


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (59.6, "1m00s"), (100, "1m40s"), (7500, "2h05m"), (3600, "1h00m"), (273600, "3d04h")]
)
def test_durations_show_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_steps_and_events_are_lines_and_evaluations_are_only_events() -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(40, stream)
    tracker.log(3, {"train/loss": 2.0})
    tracker.log(3, {"eval/held_out/loss": 1.5})
    tracker.event("eval", "held-out loss 1.500", 3, loss=1.5)
    tracker.event("info", "checkpoint written")
    tracker.finish("completed")
    assert stream.getvalue().splitlines() == [
        "step   3/40  loss 2.000",
        "eval at step 3: held-out loss 1.500",
        "info: checkpoint written",
    ]
