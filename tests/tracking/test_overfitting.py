"""When a run began to overfit, from its training and held-out losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import JsonlTracker
from launcher.tracking.run_metrics import read_overfitting


def trained(folder: Path, losses: list[tuple[float, float | None]]) -> RunDir:
    """A run with these training and held-out losses after each step; ten steps are an epoch."""
    run = RunDir(folder)
    log = JsonlTracker(run, 1)
    for step, (train, held_out) in enumerate(losses, 1):
        log.log(step, {"train/loss": train, "trainer/epoch": step / 10})
        if held_out is not None:
            log.log(step, {"eval/held_out/loss": held_out})
    return run


def test_a_held_out_loss_that_rises_while_the_training_loss_falls_is_overfitting(tmp_path: Path) -> None:
    run = trained(tmp_path, [(2.0, None), (1.9, 2.0), (1.5, None), (1.4, 1.8), (1.0, None), (0.8, 1.9), (0.6, None), (0.4, 2.2)])
    found = read_overfitting(run)
    assert found is not None
    assert (found.step, found.epoch, found.lowest, found.last) == (4, 0.4, 1.8, 2.2)
    assert (found.train_at_lowest, found.train_at_last) == (pytest.approx(1.45), pytest.approx(0.5))
    assert found.gap == pytest.approx(1.7)
    assert found.summary.startswith("overfitting since step 4 (epoch 0.4): the held-out loss rose from 1.8000 to 2.2000")


@pytest.mark.parametrize(
    "losses",
    [
        # In order: still learning; both losses rise, as after a spike; a rise within the noise; one evaluation; no evaluation.
        [(2.0, 2.0), (1.5, 1.8), (1.0, 1.7)],
        [(2.0, 2.0), (1.5, 1.8), (1.9, 2.2)],
        [(2.0, 2.0), (1.5, 1.8), (1.4, 1.81)],
        [(2.0, 2.0), (1.5, None)],
        [(2.0, None)],
    ],
)
def test_other_losses_are_not(tmp_path: Path, losses: list[tuple[float, float | None]]) -> None:
    assert read_overfitting(trained(tmp_path, losses)) is None
