"""What follows an attempt that has ended."""

from __future__ import annotations

import pytest

from launcher.config.cluster import SlurmSection
from launcher.plan.retry import Cause, Ended, decide

BUDGETS = SlurmSection(max_preemptions=3, max_infrastructure_failures=2, max_failures=1, max_no_progress=2)


def moving(*causes: Cause) -> list[Ended]:
    """Attempts that each left a newer checkpoint."""
    return [Ended(cause, 10 * i or None, 10 * (i + 1), message=str(cause)) for i, cause in enumerate(causes)]


@pytest.mark.parametrize(
    ("cause", "state"),
    [(Cause.COMPLETED, "completed"), (Cause.CANCELLED, "cancelled"), (Cause.LIMIT, "preempted"), (Cause.USER_ERROR, "failed")],
)
def test_some_ends_are_final_whatever_came_before(cause: Cause, state: str) -> None:
    decision = decide(Ended(cause, None, 5, "why"), [], BUDGETS)
    assert (decision.again, decision.state, decision.reason) == (False, state, "why")


@pytest.mark.parametrize(
    ("cause", "allowed"), [(Cause.PREEMPTED, 3), (Cause.INFRASTRUCTURE, 2), (Cause.FAILURE, 1), (Cause.TIME_LIMIT, 50)]
)
def test_each_kind_of_end_has_a_budget_of_its_own(cause: Cause, allowed: int) -> None:
    attempts = moving(*[cause] * allowed)
    assert decide(attempts[-1], attempts[:-1], BUDGETS).again
    attempts = moving(*[cause] * (allowed + 1))
    assert decide(attempts[-1], attempts[:-1], BUDGETS).again is (cause is Cause.TIME_LIMIT)


def test_a_spent_budget_is_named_and_another_kind_does_not_draw_on_it() -> None:
    attempts = moving(Cause.FAILURE, Cause.FAILURE)
    refused = decide(attempts[-1], attempts[:-1], BUDGETS)
    assert refused.state == "failed"
    assert "cluster.max_failures=1" in refused.reason
    attempts = moving(Cause.FAILURE, Cause.INFRASTRUCTURE, Cause.PREEMPTED)
    assert decide(attempts[-1], attempts[:-1], BUDGETS).again


def test_unset_preemptions_are_unlimited() -> None:
    attempts = moving(*[Cause.PREEMPTED] * 40)
    assert decide(attempts[-1], attempts[:-1], SlurmSection()).again


def test_attempts_without_a_newer_checkpoint_end_the_run() -> None:
    still = [Ended(Cause.TIME_LIMIT, None, None)] * 2
    assert decide(still[-1], still[:-1], BUDGETS).again
    refused = decide(Ended(Cause.TIME_LIMIT, None, None), still, BUDGETS)
    assert not refused.again
    assert "without a newer checkpoint" in refused.reason
    # One that moved on, or that was taken away, breaks the row.
    assert decide(Ended(Cause.TIME_LIMIT, None, 5), still, BUDGETS).again
    assert decide(Ended(Cause.TIME_LIMIT, None, None), [*still, Ended(Cause.PREEMPTED, None, None)], BUDGETS).again


def test_saving_the_step_that_it_began_with_is_no_progress() -> None:
    history = [Ended(Cause.TIME_LIMIT, 30, 30), Ended(Cause.TIME_LIMIT, 30, 30)]
    assert not decide(Ended(Cause.TIME_LIMIT, 30, 30), history, BUDGETS).again
    assert decide(Ended(Cause.TIME_LIMIT, 30, 31), history, BUDGETS).again


def test_bad_nodes_are_left_out_only_where_that_is_wanted() -> None:
    bad = Ended(Cause.BAD_NODE, None, 10, "n2 has no GPU", bad_nodes=("n2",))
    refused = decide(bad, [], BUDGETS)
    assert (refused.again, refused.state) == (False, "failed")
    assert "cluster.exclude_bad_nodes" in refused.reason
    willing = BUDGETS.model_copy(update={"exclude_bad_nodes": True})
    assert decide(bad, [], willing).exclude == ("n2",)
    later = decide(Ended(Cause.BAD_NODE, 10, 20, bad_nodes=("n5",)), [bad], willing)
    assert later.exclude == ("n2", "n5")
