"""What `status` reports about the evaluations of a run's checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hand_made import made_verdict

from launcher import atomic_files, run_store
from launcher.cli.main import main
from launcher.cli.status import summarize
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import JsonlTracker


def test_the_newest_verdict_and_what_is_still_to_be_answered_are_shown(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    status = run_store.read_status(run)
    assert (summarize(run, status)["verdict"], summarize(run, status)["answers"]) == (None, None)
    for step in (10, 20):
        folder = run.root / f"evaluations/step-{step:08d}"
        folder.mkdir(parents=True)
        made_verdict().write(folder)
    (run.root / "evaluations/step-00000030").mkdir()
    JsonlTracker(run, 2).event("answers", "the answers of step 30 come from job 77")
    shown = summarize(run, status)["verdict"]
    assert (shown["step"], shown["outcome"]) == (20, "better")
    assert main(["status", str(run.root)]) == 0
    out = capsys.readouterr().out
    assert "verdict     step 20: Fine-tuning helped: exact match 0.31" in out
    assert "answers     the answers of step 30 come from job 77" in out
    (run.root / "evaluations/step-00000030/verdict.json").write_text("{")
    assert summarize(run, status)["verdict"] is None, "a damaged one hides nothing else"


def test_the_verdict_of_a_step_that_was_set_aside_is_not_shown(run: RunDir) -> None:
    folder = run.root / "evaluations/step-00000020"
    folder.mkdir(parents=True)
    aside = run.checkpoints / "aside-step-00000020"
    aside.mkdir()
    (aside / "manifest.json").write_text("{}")
    evaluated = atomic_files.digest_file(aside / "manifest.json").xxh3_128
    replace(made_verdict(), checkpoint="d" * 32).write(folder)
    status = run_store.read_status(run)
    assert summarize(run, status)["verdict"]["step"] == 20, "retention has removed its checkpoint"
    replace(made_verdict(), checkpoint=evaluated).write(folder)
    assert summarize(run, status)["verdict"] is None
