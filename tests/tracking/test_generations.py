"""Runs that started from each other's weights are shown side by side; missing runs and other users' runs are named."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import hand_made
import pytest
from made_verdict import made_verdict

from launcher import run_store
from launcher.cli.report import _read_run_files, page
from launcher.plan.launch_plan import Lineage, Origin
from launcher.plan.run_dir import RunDir
from launcher.tracking.generations import read_generations
from launcher.tracking.jsonl import JsonlTracker

STEP = 40


def made_run(root: Path, name: str, wandb_id: str, parents: tuple[Origin, ...] = ()) -> RunDir:
    """A finished run of 40 steps that started from the weights of the first of `parents`; its verdict is for step 40."""
    lineage = Lineage(**parents[0].model_dump(), ancestors=parents[1:]) if parents else None
    plan = hand_made.plan(root / name, hand_made.SETTINGS, run_name=name, wandb_id=wandb_id, lineage=lineage)
    run = hand_made.run(plan, state="completed", step=STEP)
    log = JsonlTracker(run, 1)
    for step, held_out, general in ((0, 3.0, 2.0), (STEP, 2.5, 2.02), (2 * STEP, 9.0, 9.0)):
        log.log(step, {"eval/held_out/loss": held_out, "eval/forgetting/loss": general, "train/loss": 1.0})
    folder = run.root / f"evaluations/step-{STEP:08d}/held_out"
    folder.mkdir(parents=True)
    made_verdict().write(folder)
    return run


def origin(run: RunDir, wandb_id: str, step: int = STEP) -> Origin:
    return Origin(run_name=run.root.name, run_dir=str(run.root), step=step, plan_digest="d", wandb_id=wandb_id)


@pytest.fixture
def chain(tmp_path: Path) -> tuple[RunDir, RunDir, RunDir]:
    root = tmp_path / "runs"
    first = made_run(root, "first", "aaaa1111")
    second = made_run(root, "second", "bbbb2222", (origin(first, "aaaa1111", step=20),))
    third = made_run(root, "third", "cccc3333", (origin(second, "bbbb2222"), origin(first, "aaaa1111", step=20)))
    return first, second, third


def cells(run: RunDir) -> list[list[str]]:
    return [one.cells() for one in read_generations(run, run_store.load_plan(run))]


def test_generations_are_side_by_side(chain: tuple[RunDir, RunDir, RunDir]) -> None:
    first, second, third = cells(chain[2])
    helped = "helped, exact match 0.31 against 0.12 (0-shot) and 0.19 (8-shot)"
    assert third == ["third", "40", "train", "3.0000 to 2.5000", "2.0000 to 2.0200", f"held_out: {helped}"]
    assert second == ["second", *third[1:]]
    # It was evaluated at a step other than the one from which the next run started.
    assert first == ["first", "20", "train", "3.0000 before training", "-", f"held_out, step 40: {helped}"]
    assert cells(chain[0]) == []
    shown = page([_read_run_files(chain[2], "third")])
    assert "<h2>Generations</h2>" in shown
    assert f"held_out, step 40: {helped}" in shown
    assert "<h2>Generations</h2>" not in page([_read_run_files(chain[0], "first")])


def test_runs_that_were_moved_together_are_read(chain: tuple[RunDir, RunDir, RunDir], tmp_path: Path) -> None:
    expected = cells(chain[2])
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    assert cells(RunDir(tmp_path / "moved/third")) == expected


def test_what_cannot_be_read_is_named(chain: tuple[RunDir, RunDir, RunDir], tmp_path: Path) -> None:
    first, second, third = chain
    shutil.rmtree(first.root)
    made_run(tmp_path / "runs", "first", "dddd4444")
    shutil.rmtree(second.root)
    assert [row[2] for row in cells(third)[:2]] == ["another run has its folder now", "the run no longer exists"]
    second.root.mkdir()
    second.plan.write_text("{")
    assert "plan" in cells(third)[1][2]


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="gives a run to another user")
def test_a_run_of_another_user_is_not_read(chain: tuple[RunDir, RunDir, RunDir]) -> None:
    os.chown(chain[0].root, 12345, -1)
    first, _, third = cells(chain[2])
    assert (first[0], first[3:]) == ("first", ["", "", ""])
    assert "12345" in first[2] or "belongs to" in first[2]
    assert third[0] == "third"
