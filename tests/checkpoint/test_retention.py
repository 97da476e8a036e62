from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import hand_made
import plan_fixtures
import pytest

from launcher import run_store
from launcher.checkpoint.manifest import HELD_OUT, Checkpoint, LaterEvaluation, Manifest
from launcher.checkpoint.retention import Retention, retention_reasons, select_outdated
from launcher.checkpoint.run_retention import retention_of
from launcher.config.sections import evaluation
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


def test_the_rules_hold_for_any_set_of_checkpoints():
    """Ten thousand random sets of checkpoints, checked against each rule stated independently."""
    chance = random.Random(5)
    for _ in range(10_000):
        steps = chance.sample(range(60), chance.randint(0, 9))
        losses = {step: chance.choice((None, 0.5, 1.0, 1.5, 2.0)) for step in steps}
        last, every, best = chance.randint(0, 4), chance.randint(0, 8), chance.randint(0, 4)
        removed = set(gone(losses, keep_last=last, keep_every=every, keep_best=best))
        kept = sorted(losses.keys() - removed)
        assert not steps or max(steps) in kept
        for step in removed:
            assert sum(other > step for other in steps) >= max(1, last)
            assert not every or step % every
            assert losses[step] is None or sum(better(losses, other, step) for other in steps) >= best
        for step in kept:
            newest = sum(other > step for other in steps) < max(1, last)
            lowest = losses[step] is not None and sum(better(losses, other, step) for other in steps) < best
            assert newest or (every and step % every == 0) or lowest


def better(losses: dict[int, float | None], one: int, other: int) -> bool:
    """Whether `one` has a lower loss, or the same loss at a later step."""
    ours, theirs = losses[one], losses[other]
    return ours is not None and theirs is not None and (ours, -one) < (theirs, -other)


def test_pruning_again_removes_nothing_more():
    """Pruning after every save keeps what a single pruning at the end keeps; this may not hold with keep_best."""
    for last, every in itertools.product(range(1, 4), range(4)):
        rule = Retention(last, every)
        kept: list[Checkpoint] = []
        for checkpoint in checkpoints(dict.fromkeys(range(1, 20))):
            kept.append(checkpoint)
            kept = [c for c in kept if c not in select_outdated(kept, rule)]
        assert select_outdated(kept, rule) == []
        everything = checkpoints(dict.fromkeys(range(1, 20)))
        assert [c.step for c in kept] == [c.step for c in everything if c not in select_outdated(everything, rule)]


def test_only_losses_of_the_chosen_set_are_compared() -> None:
    made = checkpoints({10: 3.0, 20: 1.0, 30: 2.0})
    of_other = [replace(one, manifest=replace(one.manifest, eval_set="general")) for one in made[1:2]]
    mixed = [made[0], *of_other, made[2]]
    steps = [one.step for one in mixed]
    assert retention_reasons(mixed, Retention(keep_last=1, keep_best=1))[steps[2]] == ("newest", "best")
    kept = retention_reasons(mixed, Retention(keep_last=1, keep_best=1, best_set="general"))
    assert kept == {steps[0]: (), steps[1]: ("best",), steps[2]: ("newest",)}


def test_a_manifest_names_its_set_unless_that_is_the_held_out_rows() -> None:
    (checkpoint,) = checkpoints({10: 3.0})
    assert "eval_set" not in checkpoint.manifest.to_json()
    assert Manifest.from_json(checkpoint.manifest.to_json().encode()).eval_set == HELD_OUT == evaluation.HELD_OUT
    other = replace(checkpoint.manifest, eval_set="general")
    assert Manifest.from_json(other.to_json().encode()) == other


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
