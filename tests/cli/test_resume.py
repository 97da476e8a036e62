"""What `resume` checks, restores and reports before it starts the run."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from plan_fixtures import DATA

from launcher.checkpoint import store
from launcher.cli.resume import (
    _choose_checkpoint,
    _find_changed_sources,
    _require_budget,
    _require_steps_left,
    describe_moved_rows,
    describe_replaced_export,
    list_new_remarks,
)
from launcher.config.sections.data import Source
from launcher.data import cache_store
from launcher.data.sources.reading import describe_origin
from launcher.errors import SubmitError
from launcher.plan.gpu_types import Price
from launcher.plan.launch_plan import LaunchPlan, Limits
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_records, run_store
from launcher.runs.run_records import ExportRecord


def limited(run: RunDir, max_seconds: float | None) -> LaunchPlan:
    return run_store.load_plan(run).model_copy(update={"limits": Limits(max_seconds=max_seconds)})


def test_resume_refuses_a_used_up_limit(run: RunDir) -> None:
    with pytest.raises(SubmitError, match=r"used up run\.max_hours"):
        _require_budget(run, limited(run, 50 * 60))
    _require_budget(run, limited(run, 60 * 60))


def test_cost_counts_each_attempt_at_its_own_price(run: RunDir) -> None:
    """Two GPUs ran for 51 minutes at two dollars per GPU hour; the next attempt costs one dollar per GPU hour."""
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


@pytest.mark.parametrize(("size", "change"), [(16, "80 rows skipped"), (4, "40 rows repeated"), (8, None)])
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
    assert describe_moved_rows(saved, other, 10) is None, "an epoch begins, so all rows are trained"
    other = again.model_copy(update={"data": DATA.model_copy(update={"num_rows": 7})})
    assert "the data differ, so the rows have another order: step 11 begins at row " in (
        describe_moved_rows(saved, other, 10) or ""
    )


def test_what_the_changed_settings_make_worse_is_noted(run: RunDir) -> None:
    plan = run_store.load_plan(run)
    optim = plan.config.optim.model_copy(update={"warmup_steps": plan.batch.max_steps})
    changed = plan.model_copy(update={"config": plan.config.model_copy(update={"optim": optim})})
    (note,) = list_new_remarks(changed, plan)
    assert note.startswith("note: the warm-up of ")
    assert list_new_remarks(changed, changed) == []


def forget_training(run: RunDir) -> None:
    """Turn the run into one that was cancelled while its job was pending."""
    shutil.rmtree(run.checkpoints)
    run.metrics.unlink()
    run_store.update_status(run, state="cancelled", step=0)


def test_a_run_that_trained_no_step_begins_with_its_plan(run: RunDir) -> None:
    assert _choose_checkpoint(run, None) is not None
    forget_training(run)
    assert _choose_checkpoint(run, None) is None
    with pytest.raises(SubmitError, match="there is no"):
        _choose_checkpoint(run, 5)


@pytest.mark.parametrize("trace", ["status", "metrics", "checkpoint"])
def test_a_run_that_lost_its_checkpoints_does_not_begin_again(run: RunDir, trace: str) -> None:
    metrics = run.metrics.read_bytes()
    forget_training(run)
    if trace == "status":
        run_store.update_status(run, step=7)
    elif trace == "metrics":
        run.metrics.write_bytes(metrics)
    else:
        (run.checkpoints / "damaged-step-00000005").mkdir(parents=True)
    with pytest.raises(SubmitError):
        _choose_checkpoint(run, None)


def test_sources_that_changed_since_the_cache_was_built_are_named(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    source = Source(path=str(rows))
    config = run_store.load_plan(run).config
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": (source,)})})
    built = {"sources": [{"digest": describe_origin(source)["digest"]}]}
    monkeypatch.setattr(cache_store, "read_report", lambda folder: built)
    assert _find_changed_sources(DATA, config) == []
    rows.write_text('{"prompt": "a", "completion": "c"}\n')
    (changed,) = _find_changed_sources(DATA, config)
    assert changed.startswith(f"{rows} (digest {built['sources'][0]['digest'][:8]} then, ")
    rows.unlink()
    assert _find_changed_sources(DATA, config) == [], "the rows do not depend on the file"


@pytest.mark.parametrize(
    ("state", "exported", "is_complete"),
    [
        ("completed", None, False),
        # A person has exported this step in place of the last one.
        ("completed", 5, True),
        ("completed", 10, True),
        # An earlier end of the run has exported this step.
        ("failed", 5, False),
        ("failed", 10, True),
    ],
)
def test_a_run_is_complete_with_its_export(run: RunDir, state: str, exported: int | None, is_complete: bool) -> None:
    run_store.update_status(run, state=state)
    plan = run_store.load_plan(run)
    plan = plan.model_copy(update={"batch": plan.batch.model_copy(update={"max_steps": 10})})
    if exported is not None:
        run.export.mkdir()
        json_records.write(run.export / run_records.EXPORT_RECORD, ExportRecord(exported, "d", "bf16"))
    with pytest.raises(SubmitError, match="the run is complete") if is_complete else nullcontext():
        _require_steps_left(run, plan, store.get_latest(run.checkpoints))


def test_a_result_that_will_be_replaced_is_noted(run: RunDir) -> None:
    plan = run_store.load_plan(run)
    assert describe_replaced_export(run, plan, 10) is None
    run.export.mkdir()
    json_records.write(run.export / "export.json", ExportRecord(10, "d", "bf16"))
    run_store.update_status(run, state="failed")
    assert describe_replaced_export(run, plan, 5) is None
    run_store.update_status(run, state="completed")
    assert "holds step 10" in (describe_replaced_export(run, plan, 5) or "")
    note = describe_replaced_export(run, plan, 10)
    assert note is not None
    assert "export holds step 10 and is replaced when the run ends" in note
    without = plan.config.export.model_copy(update={"enabled": False})
    plan = plan.model_copy(update={"config": plan.config.model_copy(update={"export": without})})
    assert describe_replaced_export(run, plan, 10) is None
