"""The comparison with an undisturbed run reports every difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from killed_runs import COMPARED, differences, draw_kills, row_differences, steps_for


def write_run(run: Path, *losses: tuple[int, float]) -> Path:
    run.mkdir(exist_ok=True)
    lines = [dict.fromkeys(COMPARED, 1.0) | {"trainer/step": step, "train/loss": loss} for step, loss in losses]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def write_rows(rows: Path, *batches: tuple[int, list[int]]) -> Path:
    rows.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "own": own, "all": own}) for step, own in batches]
    (rows / "001-0.jsonl").write_text("\n".join(lines) + "\n")
    return rows


def test_repeated_steps_are_counted_each_time(tmp_path: Path) -> None:
    left_alone = write_run(tmp_path / "left", (1, 3.0), (2, 2.0), (3, 1.0))
    run = tmp_path / "killed"
    assert differences(write_run(run, (1, 3.0), (2, 2.0), (1, 3.0), (2, 2.0), (3, 1.0)), left_alone) == []
    (different,) = differences(write_run(run, (1, 3.0), (2, 2.5), (2, 2.0), (3, 1.0)), left_alone)
    assert different == "step 2: train/loss was 2.5, undisturbed {2.0}"
    assert differences(write_run(run, (1, 3.0), (2, 2.0)), left_alone) == ["steps that were never trained: [3]"]


def test_different_and_missing_rows_are_detected(tmp_path: Path) -> None:
    left_alone = write_rows(tmp_path / "left", (1, [5, 6]), (2, [7, 8]))
    rows = tmp_path / "killed"
    assert row_differences(write_rows(rows, (1, [5, 6]), (1, [5, 6]), (2, [7, 8])), left_alone, 1, 2) == []
    assert row_differences(write_rows(rows, (1, [5, 6]), (1, [6, 5]), (2, [7, 8])), left_alone, 1, 2)
    assert row_differences(write_rows(rows, (1, [5, 6])), left_alone, 1, 2)


@pytest.mark.parametrize("seed", range(20))
def test_a_run_has_enough_steps_for_its_kills(seed: int) -> None:
    kills = draw_kills(seed, 50, num_ranks=2, save_every=4)
    assert kills == draw_kills(seed, 50, num_ranks=2, save_every=4)
    # No checkpoint is newer than the last step trained before the kill.
    assert steps_for(kills, 4) <= sum(kill.steps + 6 for kill in kills if kill.steps) + 8
    assert steps_for(kills, 4) > max(kill.steps for kill in kills)
