"""What a run has spent, asked before it is resumed."""

from __future__ import annotations

import pytest

from launcher import run_store
from launcher.cli.resume import _require_budget
from launcher.errors import SubmitError
from launcher.plan.launch_plan import LaunchPlan, Limits
from launcher.plan.run_dir import RunDir


def limited(run: RunDir, max_seconds: float | None) -> LaunchPlan:
    return run_store.load_plan(run).model_copy(update={"limits": Limits(max_seconds=max_seconds)})


def test_a_limit_that_is_used_up_is_refused(run: RunDir) -> None:
    with pytest.raises(SubmitError, match=r"used up run\.max_hours"):
        _require_budget(run, limited(run, 50 * 60))
    _require_budget(run, limited(run, 60 * 60))


def test_files_that_cannot_be_read_are_named_and_only_where_there_is_a_limit(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run.events.write_text('{"attempt": 1}\n')
    _require_budget(run, limited(run, None))
    assert capsys.readouterr().out == ""
    _require_budget(run, limited(run, 50 * 60))
    assert capsys.readouterr().out.startswith("note: what the run has spent cannot be read, so its limits count from here: ")
