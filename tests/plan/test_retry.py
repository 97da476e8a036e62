"""The retry policy: whether a run continues after an attempt ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.config.sections.slurm import SlurmSection
from launcher.plan.retry import MOST_FRUITLESS_PREEMPTIONS, AttemptEnd, Cause, RestartedRanks, decide

BUDGETS = SlurmSection(max_infrastructure_failures=2, max_failures=1)


def moving(*causes: Cause) -> list[AttemptEnd]:
    """Return attempts that each saved a newer checkpoint."""
    return [AttemptEnd(cause, 10 * i or None, 10 * (i + 1), message=str(cause)) for i, cause in enumerate(causes)]


def stuck(*causes: Cause) -> list[AttemptEnd]:
    """Return attempts that each ended with the checkpoint they started from."""
    return [AttemptEnd(cause, 10, 10, message=str(cause)) for cause in causes]


@pytest.mark.parametrize(
    ("cause", "state"),
    [(Cause.COMPLETED, "completed"), (Cause.CANCELLED, "cancelled"), (Cause.LIMIT, "preempted"), (Cause.USER_ERROR, "failed")],
)
def test_some_causes_are_always_final(cause: Cause, state: str) -> None:
    decision = decide(AttemptEnd(cause, None, 5, "why"), [], BUDGETS)
    assert (decision.again, decision.state, decision.reason) == (False, state, "why")


@pytest.mark.parametrize(("cause", "allowed"), [(Cause.INFRASTRUCTURE, 2), (Cause.FAILURE, 1)])
def test_each_cause_has_its_own_budget(cause: Cause, allowed: int) -> None:
    attempts = stuck(*[cause] * allowed)
    assert decide(attempts[-1], attempts[:-1], BUDGETS).again
    attempts = stuck(*[cause] * (allowed + 1))
    assert not decide(attempts[-1], attempts[:-1], BUDGETS).again


@pytest.mark.parametrize("cause", [Cause.INFRASTRUCTURE, Cause.BAD_NODE, Cause.FAILURE])
def test_a_run_with_newer_checkpoints_survives_any_number_of_failures(cause: Cause) -> None:
    budgets = BUDGETS.model_copy(update={"exclude_bad_nodes": True})
    attempts = moving(*[cause] * 40)
    assert decide(attempts[-1], attempts[:-1], budgets).again


def test_the_failure_after_the_newest_checkpoint_counts() -> None:
    moved, still = AttemptEnd(Cause.FAILURE, None, 10), AttemptEnd(Cause.FAILURE, 10, 10)
    assert decide(moved, [], BUDGETS).again
    assert not decide(still, [moved], BUDGETS).again
    assert not decide(moved, [], BUDGETS.model_copy(update={"max_failures": 0})).again


def test_many_preemptions_without_a_newer_checkpoint_end_the_run() -> None:
    attempts = stuck(*[Cause.PREEMPTED] * MOST_FRUITLESS_PREEMPTIONS)
    refused = decide(attempts[-1], attempts[:-1], SlurmSection())
    assert (refused.again, refused.state) == (False, "failed")
    assert f"{MOST_FRUITLESS_PREEMPTIONS} preemptions without a newer checkpoint" in refused.reason
    assert decide(attempts[-1], attempts[:-2], SlurmSection()).again
    moved = [*attempts[:10], AttemptEnd(Cause.PREEMPTED, 10, 20), *attempts[10:]]
    assert decide(moved[-1], moved[:-1], SlurmSection()).again
    resized = [*stuck(Cause.RESIZED), *attempts[1:-1], *stuck(Cause.RESIZED)]
    refused = decide(resized[-1], resized[:-1], SlurmSection())
    assert (refused.again, refused.state) == (False, "failed")
    assert "preemptions and changes of size without a newer checkpoint between them; save more often" in refused.reason
    assert decide(resized[-1], resized[1:-1], SlurmSection()).again


def test_an_exceeded_budget_is_named_and_other_causes_do_not_count() -> None:
    attempts = stuck(Cause.FAILURE, Cause.FAILURE)
    refused = decide(attempts[-1], attempts[:-1], BUDGETS)
    assert refused.state == "failed"
    assert "cluster.max_failures=1" in refused.reason
    attempts = stuck(Cause.FAILURE, Cause.INFRASTRUCTURE, Cause.PREEMPTED)
    assert decide(attempts[-1], attempts[:-1], BUDGETS).again


def test_preemptions_are_unlimited() -> None:
    attempts = moving(*[Cause.PREEMPTED] * 40)
    assert decide(attempts[-1], attempts[:-1], SlurmSection()).again


def test_attempts_without_a_newer_checkpoint_end_the_run() -> None:
    still = [AttemptEnd(Cause.TIME_LIMIT, None, None)] * 2
    assert decide(still[-1], still[:-1], BUDGETS).again
    refused = decide(AttemptEnd(Cause.TIME_LIMIT, None, None), still, BUDGETS)
    assert not refused.again
    assert "without a newer checkpoint" in refused.reason
    # An attempt that made progress, or was preempted, interrupts the series.
    assert decide(AttemptEnd(Cause.TIME_LIMIT, None, 5), still, BUDGETS).again
    assert decide(AttemptEnd(Cause.TIME_LIMIT, None, None), [*still, AttemptEnd(Cause.PREEMPTED, None, None)], BUDGETS).again


def test_saving_the_first_step_again_is_no_progress() -> None:
    history = [AttemptEnd(Cause.TIME_LIMIT, 30, 30), AttemptEnd(Cause.TIME_LIMIT, 30, 30)]
    assert not decide(AttemptEnd(Cause.TIME_LIMIT, 30, 30), history, BUDGETS).again
    assert decide(AttemptEnd(Cause.TIME_LIMIT, 30, 31), history, BUDGETS).again


def test_bad_nodes_are_excluded_only_with_the_setting() -> None:
    bad = AttemptEnd(Cause.BAD_NODE, 10, 10, "n2 has no GPU", bad_nodes=("n2",))
    refused = decide(bad, [], BUDGETS)
    assert (refused.again, refused.state) == (False, "failed")
    assert "cluster.exclude_bad_nodes" in refused.reason
    assert refused.reason.endswith("check the nodes with: python -m launcher doctor +cluster=slurm")
    willing = BUDGETS.model_copy(update={"exclude_bad_nodes": True})
    assert decide(bad, [], willing).exclude == ("n2",)
    later = AttemptEnd(Cause.BAD_NODE, 10, 10, bad_nodes=("n5",))
    assert decide(later, [bad], willing).exclude == ("n2", "n5")
    moved = AttemptEnd(Cause.PREEMPTED, 10, 20)
    assert decide(moved, [bad, later], willing).exclude == (), "they may be well again"
    assert decide(replace(later, saved_step=20, began_step=20), [bad, moved], willing).exclude == ("n5",)


def test_a_run_that_has_begun_gets_one_more_attempt_after_a_failed_check() -> None:
    bad = AttemptEnd(Cause.BAD_NODE, 10, 10, "n2 has no GPU", bad_nodes=("n2",))
    trained = AttemptEnd(Cause.TIME_LIMIT, None, 10)
    again = decide(bad, [trained], BUDGETS)
    assert (again.again, again.exclude) == (True, ())
    assert not decide(bad, [trained, bad], BUDGETS).again


def failed(
    exception: str = "IndexError",
    step: int = 43,
    began: int | None = 40,
    saved: int | None = 40,
    restarts: tuple[RestartedRanks, ...] = (),
) -> AttemptEnd:
    return AttemptEnd(Cause.FAILURE, began, saved, "rank 1: as it says", exception=exception, step=step, restarts=restarts)


LOST = AttemptEnd(Cause.INFRASTRUCTURE, 40, 40, "rank 1: killed by SIGKILL")
RESTARTED = RestartedRanks("IndexError", 43, 40)


@pytest.mark.parametrize(
    ("ends", "again"),
    [
        ([failed(began=None), failed(), failed()], False),
        ([failed(began=None), failed(), LOST, failed()], False),
        ([failed(saved=None, began=None)] * 3, False),
        # Retried: first resume, other step, other exception, other start checkpoint, newer checkpoint.
        ([failed(began=None), failed()], True),
        ([failed(began=None), failed(), failed(step=44)], True),
        ([failed(began=None), failed(), failed("KeyError")], True),
        ([failed(began=None, saved=20), failed(began=20), failed()], True),
        ([failed(began=None), failed(), failed(saved=43)], True),
        # Signals, hangs and lost nodes have no exception: they may repeat at the same step as often as the budgets allow.
        ([failed("")] * 3, True),
        ([LOST] * 9, True),
        # Ranks restarted within an attempt also resumed from the checkpoint.
        ([failed(began=None, restarts=(RESTARTED, RESTARTED))], False),
        ([failed(restarts=(RESTARTED,)), failed()], False),
        ([failed(began=None, restarts=(RESTARTED,)), LOST, failed()], False),
        ([failed(began=None, restarts=(RESTARTED, RestartedRanks("", None, 40), RESTARTED))], False),
        ([failed(began=None, restarts=(RESTARTED,))], True),
        ([failed(began=None, restarts=(RestartedRanks("", None, 40),) * 9)], True),
        ([failed("", restarts=(RESTARTED, RESTARTED))], True),
        ([failed(began=None, restarts=(replace(RESTARTED, step=44), RESTARTED))], True),
        ([failed(began=None, restarts=(replace(RESTARTED, saved_step=30), RESTARTED))], True),
        ([replace(LOST, restarts=(RESTARTED,) * 3)], True),
    ],
)
def test_only_the_same_exception_at_the_same_step_after_two_resumes_is_final(
    ends: list[AttemptEnd], again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.plan.retry._MOST_WITHOUT_PROGRESS", 9)
    budgets = BUDGETS.model_copy(update={"max_failures": 9, "max_infrastructure_failures": 9})
    decision = decide(ends[-1], ends[:-1], budgets)
    assert decision.again is again
    start = "the initial weights" if ends[-1].saved_step is None else "the checkpoint of step 40"
    reason = f"rank 1: as it says; IndexError in step 44 occurred 3 times, twice after a resume from {start}: it repeats"
    assert again or decision.reason == reason
