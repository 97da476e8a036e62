from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hand_made
import plan_fixtures
import pytest

from launcher import run_store
from launcher.checkpoint.manifest import HELD_OUT, Checkpoint, LaterEvaluation, Manifest
from launcher.checkpoint.retention import Retention, retention_of, retention_reasons, select_outdated
from launcher.plan.launch_plan import LaunchPlan
from launcher.run_records import Attempt


def checkpoints(losses: dict[int, float | None]) -> list[Checkpoint]:
    """A checkpoint for each step, with its held-out loss."""
    return [
        Checkpoint(
            Path(f"step-{step:08d}"), Manifest(step=step, world_size=1, plan_digest="d", attempt=1, eval_loss=loss, files={})
        )
        for step, loss in sorted(losses.items())
    ]


def gone(losses: dict[int, float | None], **rules: int) -> list[int]:
    return [checkpoint.step for checkpoint in select_outdated(checkpoints(losses), Retention(**rules))]


UNEVALUATED = dict.fromkeys((10, 20, 30, 40, 50))


@pytest.mark.parametrize(
    ("losses", "rules", "expected"),
    [
        (UNEVALUATED, {"keep_last": 2}, [10, 20, 30]),
        (UNEVALUATED, {"keep_last": 9}, []),
        (UNEVALUATED, {"keep_last": 0}, [10, 20, 30, 40]),
        (UNEVALUATED, {"keep_every": 20}, [10, 30]),
        (UNEVALUATED, {"keep_best": 3}, [10, 20, 30, 40]),
        ({0: None, 5: None, 7: None}, {"keep_every": 5}, []),
        ({10: 2.0, 20: 1.0, 30: None, 40: 3.0}, {"keep_best": 1}, [10, 30]),
        ({10: 2.0, 20: 1.0, 30: None, 40: 3.0}, {"keep_best": 2}, [30]),
        ({10: 1.0, 20: 1.0, 30: 1.0, 40: 2.0}, {"keep_best": 1}, [10, 20]),
        ({10: float("nan"), 20: 5.0, 30: 6.0, 40: float("-inf")}, {"keep_best": 1}, [10, 30]),
        ({10: 1.0, 20: 9.0, 30: 8.0, 40: 7.0, 50: 6.0}, {"keep_last": 2, "keep_every": 20, "keep_best": 1}, [30]),
        ({}, {"keep_last": 2, "keep_best": 1}, []),
    ],
)
def test_checkpoints_that_no_rule_keeps_are_outdated(losses, rules, expected):
    assert gone(losses, **rules) == expected


def test_each_rule_names_the_steps_that_it_keeps():
    found = checkpoints({100: 1.0, 150: 2.0, 200: None, 250: 3.0})
    kept = retention_reasons(found, Retention(keep_last=1, keep_every=100, keep_best=1))
    assert kept == {100: ("every 100", "best"), 150: (), 200: ("every 100",), 250: ("newest",)}


def test_only_losses_of_the_chosen_set_are_compared() -> None:
    made = checkpoints({10: 3.0, 20: 1.0, 30: 2.0})
    of_other = [replace(one, manifest=replace(one.manifest, eval_set="general")) for one in made[1:2]]
    mixed = [made[0], *of_other, made[2]]
    steps = [one.step for one in mixed]
    assert retention_reasons(mixed, Retention(keep_last=1, keep_best=1))[steps[2]] == ("newest", "best")
    kept = retention_reasons(mixed, Retention(keep_last=1, keep_best=1, best_set="general"))
    assert kept == {steps[0]: (), steps[1]: ("best",), steps[2]: ("newest",)}


def test_losses_on_other_rows_count_only_where_too_few_are_on_these_rows() -> None:
    made = checkpoints({10: 1.0, 20: 4.0, 30: 3.0, 40: 5.0})
    before = replace(made[0], manifest=replace(made[0].manifest, plan_digest="earlier"))
    rules = Retention(keep_last=1, keep_best=1, rows="these", other_rows=frozenset({"earlier"}))
    assert retention_reasons([before, *made[1:]], rules) == {10: (), 20: (), 30: ("best",), 40: ("newest",)}
    unevaluated = checkpoints({40: None})
    assert retention_reasons([before, *unevaluated], rules) == {10: ("best",), 40: ("newest",)}, "nothing better is known"
    assert retention_reasons([before, *made[1:]], replace(rules, keep_best=4))[10] == ("best",)


@pytest.mark.parametrize(("rows", "is_best"), [("these", True), ("others", False), ("", False)])
def test_a_later_evaluation_names_its_rows(rows: str, is_best: bool) -> None:
    made = checkpoints({10: None, 20: 4.0})
    manifest = replace(made[0].manifest, plan_digest="earlier")
    later = replace(made[0], manifest=manifest, later_evaluation=LaterEvaluation(HELD_OUT, 2.0, rows))
    rules = Retention(keep_last=1, keep_best=1, rows="these", other_rows=frozenset({"earlier"}))
    assert ("best" in retention_reasons([later, made[1]], rules)[10]) is is_best


def test_the_plans_of_a_run_say_which_losses_are_on_other_rows(tmp_path: Path) -> None:
    def plan_with(digest: str, **settings: object) -> LaunchPlan:
        values = {**hand_made.SETTINGS, "checkpoint": {"keep_best": 1, **settings}}
        return hand_made.plan(tmp_path / "a", values, data=plan_fixtures.DATA.model_copy(update={"digest": digest}))

    # The first part is the digest of the training rows.
    first, same, other = plan_with("a-1"), plan_with("b-1", keep_last=3), plan_with("a-2")
    run = run_store.create(first)
    for plan in (same, other):
        run_store.write_plan(run, run_store.create_attempt(run, Attempt(resume_step=4)), plan)
    assert (retention_of(run, first).rows, retention_of(run, first).other_rows) == ("1", {other.digest()})
    assert retention_of(run, other).other_rows == {first.digest(), same.digest()}
    assert retention_of(run, plan_with("a-2", keep_best=0)).other_rows == frozenset()
