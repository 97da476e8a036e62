"""The sample question and answers that a run records at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from plan_fixtures import DATA

from launcher.data import cache_store
from launcher.evaluate import answers
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import JsonlTracker
from launcher.tracking.tracker import Composite

KEY = "sk-proj-" + "aB3" * 12


def test_secrets_in_questions_and_answers_are_redacted(
    plan_of: Callable[..., LaunchPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = {"prompt": f"Is it {KEY}?", "prompt_ids": [1], "answer": f"Mail eve@corp.com,\nkey {KEY}."}
    cache_store.write_json(tmp_path / "samples.json", [sample])
    # The fake answer repeats a key, as a real model may.
    monkeypatch.setattr(answers, "_continue_prompt", lambda *inputs: f"Yes, {KEY}.")
    plan = plan_of("model=tiny").model_copy(update={"data": DATA.model_copy(update={"cache_dir": str(tmp_path)})})
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    answers.report_answers(plan, tmp_path, "cpu", Composite([JsonlTracker(run, 1)]))
    texts = "\n".join(json.loads(line)["text"] for line in run.events.read_text().splitlines())
    assert KEY[:12] not in texts
    assert "eve@" not in texts
    for text in ("held-out question: Is it [API key: s…, 44 characters]?", "answer after:      Yes, [API key"):
        assert text in texts
    # A removed data cache does not end a run that is complete.
    (tmp_path / "samples.json").unlink()
    answers.report_answers(plan, tmp_path, "cpu", Composite([JsonlTracker(run, 1)]))
    last = json.loads(run.events.read_text().splitlines()[-1])
    assert last["kind"] == "alert"
    assert "samples.json" in last["text"]
