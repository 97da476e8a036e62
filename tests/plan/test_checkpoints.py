"""How many checkpoints a run needs disk space for, and the messages if there is too little."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from plan_fixtures import plan_lines

from launcher.plan.checkpoints import checkpoints_at_once, low_room_note, needed_bytes, no_room_problem
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_size

PlanOf = Callable[..., LaunchPlan]


@pytest.mark.parametrize(
    ("tokens", "count"),
    [
        (["train.max_steps=100", "checkpoint.save_every=10", "checkpoint.keep_last=2"], 3),
        (["train.max_steps=100", "checkpoint.save_every=10", "checkpoint.keep_last=1"], 2),
        (["train.max_steps=100", "checkpoint.save_every=10", "checkpoint.keep_last=2", "checkpoint.keep_every=50"], 5),
        (["train.max_steps=100", "checkpoint.save_every=10", "checkpoint.keep_last=2", "checkpoint.keep_best=3"], 6),
        # The number of saves limits the number of checkpoints.
        (["train.max_steps=100"], 1),
        (["train.max_steps=100", "checkpoint.save_every=60", "checkpoint.keep_last=9"], 2),
        (["train.max_steps=100", "checkpoint.save_every=50", "checkpoint.keep_last=9"], 2),
    ],
)
def test_kept_checkpoints_and_the_one_being_written_need_room(plan_of: PlanOf, tokens: list[str], count: int) -> None:
    assert checkpoints_at_once(plan_of(*tokens)) == count


def test_unknown_steps_do_not_limit_the_number_of_checkpoints(plan_of: PlanOf) -> None:
    plan = plan_of("train.epochs=1", "train.max_steps=null", "checkpoint.keep_last=2", data=None)
    assert plan.batch.max_steps is None
    assert checkpoints_at_once(plan) == 3


def test_too_little_room_is_refused_or_noted_with_numbers(plan_of: PlanOf) -> None:
    plan = plan_of("train.max_steps=100", "checkpoint.save_every=10", "checkpoint.keep_last=2")
    one = needed_bytes(plan)
    assert one > plan.checkpoint_bytes + 64 * plan.model.vocab_size * 2, "the logits for the check of the export count"
    refused = no_room_problem(plan, one - 1)
    assert refused is not None
    assert refused.value == f"needed {format_size(one)}, available {format_size(one - 1)}"
    assert no_room_problem(plan, one) is None
    three = needed_bytes(plan, 3)
    note = low_room_note(plan, three - 1, present=0)
    assert note is not None
    assert f"has {format_size(three - 1)} free and needs {format_size(three)} for 3 checkpoints" in note
    assert low_room_note(plan, three, present=0) is None
    # Existing checkpoints need no additional space.
    assert low_room_note(plan, one, present=2) is None
    assert f"needs {format_size(needed_bytes(plan, 2))} for 2 more checkpoints" in (low_room_note(plan, one, present=1) or "")
    assert f"needs {format_size(one)} for 1 more checkpoint," in (low_room_note(plan, one - 1, present=9) or "")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["checkpoint.keep_last=1"], "each, the newest is kept;"),
        (["checkpoint.keep_last=3"], "each, the newest 3 are kept;"),
        (["checkpoint.keep_last=1", "checkpoint.keep_every=100"], "each, the newest and every 100 steps are kept;"),
        (
            ["checkpoint.keep_last=2", "checkpoint.keep_every=100", "checkpoint.keep_best=2"],
            "each, the newest 2 and the best 2 and every 100 steps are kept;",
        ),
    ],
)
def test_the_plan_shows_which_checkpoints_are_kept(plan_of: PlanOf, tokens: list[str], text: str) -> None:
    (line,) = [line for line in plan_lines(plan_of(*tokens)) if line.startswith("checkpoint")]
    assert text in line
