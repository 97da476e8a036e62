"""Limits and batch sizes are checked before a run is resumed."""

from __future__ import annotations

import pytest
from plan_fixtures import DATA

from launcher import run_store
from launcher.cli.resume import _require_budget, describe_moved_rows
from launcher.errors import SubmitError
from launcher.plan.gpus import Price
from launcher.plan.launch_plan import LaunchPlan, Limits
from launcher.plan.run_dir import RunDir


def limited(run: RunDir, max_seconds: float | None) -> LaunchPlan:
    return run_store.load_plan(run).model_copy(update={"limits": Limits(max_seconds=max_seconds)})


def test_resume_refuses_a_used_up_limit(run: RunDir) -> None:
    with pytest.raises(SubmitError, match=r"used up run\.max_hours"):
        _require_budget(run, limited(run, 50 * 60))
    _require_budget(run, limited(run, 60 * 60))


def test_cost_counts_each_attempt_at_its_own_price(run: RunDir) -> None:
    """Two GPUs ran for 51 minutes at two dollars; the next attempt costs one."""
    plan = run_store.load_plan(run)

    def allowed(usd: float) -> LaunchPlan:
        limits = Limits(max_seconds=None, max_gpu_seconds=usd * 3600)
        config = plan.config.model_copy(update={"run": plan.config.run.model_copy(update={"max_usd": usd})})
        return plan.model_copy(update={"limits": limits, "config": config, "price": Price(usd_per_gpu_hour=1.0)})

    with pytest.raises(SubmitError, match=r"used up run\.max_usd") as refused:
        _require_budget(run, allowed(3.3))
    assert refused.value.problems[0].value == "it has cost $3.40, for 1.70 GPU hours"
    _require_budget(run, allowed(3.5))
    _require_budget(run, plan)


def test_unreadable_files_are_noted_only_if_there_is_a_limit(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.events.write_text('{"attempt": 1}\n')
    _require_budget(run, limited(run, None))
    assert capsys.readouterr().out == ""
    _require_budget(run, limited(run, 50 * 60))
    assert capsys.readouterr().out.startswith(
        "note: the time and cost so far cannot be read, so the limits count from this attempt on: "
    )


@pytest.mark.parametrize(("size", "change"), [(16, "80 rows are skipped"), (4, "40 rows are repeated"), (8, None)])
def test_a_changed_batch_size_is_noted_with_the_skipped_or_repeated_rows(run: RunDir, size: int, change: str | None) -> None:
    plan = run_store.load_plan(run)
    saved, again = (
        plan.model_copy(update={"batch": plan.batch.model_copy(update={"global_batch_size": batch_size}), "data": DATA})
        for batch_size in (8, size)
    )
    note = describe_moved_rows(saved, again, 10)
    assert (note is None) is (change is None)
    assert describe_moved_rows(saved, again, 0) is None
    if note is not None and change is not None:
        assert note == f"step 10 starts at row {10 * size} of the order after 80 trained rows: {change}"
    data = again.config.data.model_copy(update={"packing": False})
    grouped = again.model_copy(update={"config": again.config.model_copy(update={"data": data})})
    assert ("changes the order" in (describe_moved_rows(saved, grouped, 10) or "")) is (change is not None)
    other = again.model_copy(update={"data": DATA.model_copy(update={"num_rows": 5})})
    assert describe_moved_rows(saved, other, 10) is None, "of other data, other rows"
