"""The report of a drill, for runs that recovered from a fault and runs that did not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from forked import Launch, require_exit

from launcher.cli.drill import Records, Step, judge, report_rows
from launcher.clusters.backends import InjectedFault
from launcher.plan.retry import Cause
from launcher.runs.journal import AttemptConcluded

HIT_AT = 1000.0


def steps(attempt: int, restart: int, first: int, last: int, since: float, shift: float = 0.0) -> tuple[Step, ...]:
    """Return one step per second. A step has the same loss in every attempt and restart, apart from `shift`."""
    return tuple(Step((attempt, restart), n, 10 / n + shift, since + n - first) for n in range(first, last + 1))


RESTARTED = Records(
    fault="kill-rank",
    device="cpu",
    run="runs/drill",
    keep_last=2,
    injected=InjectedFault("SIGKILL to rank 1", HIT_AT, "n2"),
    life=(1, 0),
    saved_step=5,
    # Step 9 was still being logged when the rank was killed.
    steps=steps(1, 0, 1, 9, HIT_AT - 8) + steps(1, 1, 6, 10, HIT_AT + 20),
    exit_record=None,
    committed=frozenset({5}),
    intact=frozenset({5}),
    resumed_attempt=None,
    last_status="running",
)
REQUEUED = replace(
    RESTARTED,
    steps=steps(1, 0, 1, 9, HIT_AT - 8) + steps(2, 0, 6, 10, HIT_AT + 60),
    exit_record=AttemptConcluded(state="pending", cause=Cause.INFRASTRUCTURE, message="no record from n2"),
)


def test_a_restart_of_the_ranks_is_a_recovery() -> None:
    report = judge(RESTARTED)
    assert report["has_recovered"]
    assert json.loads(json.dumps(report)) == report
    assert dict(report_rows(report).rows) == {
        "fault": "kill-rank",
        "run": "runs/drill",
        "action": "SIGKILL to rank 1",
        "host": "n2",
        "happened": "the node agents restarted all ranks",
        "continued": "in the same allocation, restart 1 of its ranks",
        "reached step": "9",
        "resumed step": "5",
        "lost steps": "4",
        "trains again": "20.0 s",
        "caught up": "24.0 s",
        "checkpoints kept": "5",
        "replayed steps": "4",
        "differing steps": "0",
        "has recovered": "True",
    }


@pytest.mark.parametrize(
    "changes, happened, continued",
    [
        ({}, "infrastructure: no record from n2", "as attempt 2, started by the launcher"),
        (
            {"exit_record": None, "resumed_attempt": 2, "last_status": "failed: the agent is gone"},
            "failed: the agent is gone",
            "as attempt 2, started by the drill, as a user would (python -m launcher resume)",
        ),
    ],
)
def test_another_attempt_that_continues_is_a_recovery(changes: dict, happened: str, continued: str) -> None:
    report = judge(replace(REQUEUED, **changes))
    assert report["has_recovered"]
    assert (report["happened"], report["continued"]) == (happened, continued)


DEAD = {"steps": RESTARTED.steps[:9], "last_status": "failed: cluster.max_failures=2 is used up"}
SHORT = {"steps": RESTARTED.steps[:12], "last_status": "failed: rank 1: killed by SIGKILL"}
PRUNED = {"committed": frozenset({5, 10, 15, 20})}
FROM_THE_START = steps(1, 0, 1, 9, HIT_AT - 8) + steps(1, 1, 1, 10, HIT_AT + 20)
DIFFERING = RESTARTED.steps[:9] + steps(1, 1, 6, 10, HIT_AT + 20, shift=1e-6)


@pytest.mark.parametrize(
    "records, changes, problem",
    [
        (RESTARTED, DEAD, "the run did not train again: failed: cluster.max_failures=2 is used up"),
        (RESTARTED, SHORT, "did not get past step 9: failed: rank 1"),
        (RESTARTED, {**PRUNED, "intact": frozenset({15, 20})}, ""),
        (RESTARTED, {**PRUNED, "intact": frozenset({20})}, "committed checkpoints are missing or damaged: step 15"),
        (RESTARTED, {"steps": FROM_THE_START}, "continued from step 0, although step 5 was saved"),
        (REQUEUED, {"fault": "preempt"}, "the save after the signal was not committed"),
        (REQUEUED, {"fault": "preempt", "steps": steps(1, 0, 1, 9, HIT_AT - 8) + steps(2, 0, 10, 11, HIT_AT + 60)}, ""),
        (RESTARTED, {"steps": DIFFERING}, "the losses of the repeated steps differ"),
        (RESTARTED, {"steps": DIFFERING, "device": "cuda"}, ""),
    ],
)
def test_a_run_that_loses_more_than_it_may_has_not_recovered(records: Records, changes: dict, problem: str) -> None:
    report = judge(replace(records, **changes))
    assert problem in "; ".join(report["problems"])
    assert report["has_recovered"] is (problem == "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--fault", "earthquake", "model=tiny"], "argument --fault: "),
        (["--fault", "hang", "model=tiny", "checkpoint.save_every=1"], "checkpoint.save_every"),
    ],
)
def test_invalid_drills_are_refused(launch_here: Launch, arguments: list[str], message: str, tmp_path: object) -> None:
    done = launch_here("drill", *arguments, cwd=tmp_path)
    require_exit(done, 2)
    assert message in done.stderr
