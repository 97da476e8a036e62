"""The report of a drill, for runs that recovered from a fault and runs that did not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest

from launcher.cli.views.drill_report import Hit, Records, Report, Step, judge, lines
from launcher.plan.retry import Cause
from launcher.run_records import Attempt, ExitRecord

CHECKPOINTS = "/runs/drill/checkpoints"
HIT_AT = 1000.0


def steps(attempt: int, restart: int, first: int, last: int, since: float, shift: float = 0.0) -> tuple[Step, ...]:
    """Return one step per second. A step has the same loss in every attempt and restart, apart from `shift`."""
    return tuple(Step((attempt, restart), n, 10 / n + shift, since + n - first) for n in range(first, last + 1))


def line(step: int, attempt: int, restart: int) -> dict:
    return {"trainer/step": float(step), "attempt": attempt, "run/restarts": float(restart), "train/loss": 2.5, "time": 7.0}


RESTARTED = Records(
    fault="kill-rank",
    device="cpu",
    run="runs/drill",
    checkpoints=CHECKPOINTS,
    keep_last=2,
    hit=Hit("SIGKILL to rank 1", HIT_AT, "n2", (1, 0), 5),
    # Step 9 was still being logged when the rank was killed.
    steps=steps(1, 0, 1, 9, HIT_AT - 8) + steps(1, 1, 6, 10, HIT_AT + 20),
    attempts={1: Attempt(None, job="7", nodes=("n1", "n2"))},
    exits={},
    errors=(),
    committed=frozenset({5}),
    resumed_attempt=None,
    ended_as="",
    last_status="running",
)
REQUEUED = replace(
    RESTARTED,
    steps=steps(1, 0, 1, 9, HIT_AT - 8) + steps(2, 0, 6, 10, HIT_AT + 60),
    attempts={**RESTARTED.attempts, 2: Attempt(5, job="7", restart=1, automatic=True)},
    exits={1: ExitRecord("pending", cause=Cause.INFRASTRUCTURE, message="no record from n2")},
)
PREEMPTED = replace(
    REQUEUED,
    fault="preempt",
    steps=steps(1, 0, 1, 9, HIT_AT - 8) + steps(2, 0, 10, 11, HIT_AT + 60),
    exits={1: ExitRecord("pending", cause=Cause.PREEMPTED, message="saved at step 9")},
    committed=frozenset({5, 9}),
)
FULL = "the checkpoint could not be written\n  where:  rank 1, {folder}/.saving-step-00000010-001/x\n  value:  {why}"
DISK_FULL = replace(
    RESTARTED,
    fault="fill-disk",
    errors=(
        "RuntimeError: Connection closed by peer",
        "CheckpointError: " + FULL.format(folder=CHECKPOINTS, why="File too large"),
    ),
)
SAVED_AGAIN = replace(
    DISK_FULL,
    steps=steps(1, 0, 1, 21, HIT_AT - 8),
    errors=("step 10 was not saved: it could not be written (rank 1, " + f"{CHECKPOINTS}/.saving-x: File too large)",),
    committed=frozenset({5, 20}),
)
WHOLE = frozenset({5})


def problems(records: Records, committed: frozenset[int] = WHOLE) -> str:
    report = judge(records, committed)
    assert report.has_recovered is not bool(report.problems)
    assert ("did NOT recover" in "\n".join(lines(report))) is bool(report.problems)
    return "; ".join(report.problems)


def report_lines(report: Report) -> dict[str, str]:
    return {text[:11].strip(): text[11:] for text in lines(report)}


def test_a_step_is_read_from_a_line_of_metrics() -> None:
    assert Step.of(line(3, attempt=2, restart=1)) == Step((2, 1), 3, 2.5, 7.0)


def test_a_restart_of_the_ranks_is_a_recovery() -> None:
    report = judge(RESTARTED, WHOLE)
    assert report.has_recovered
    assert (report.reached_step, report.resumed_step, report.lost_steps) == (9, 5, 4)
    assert (report.trains_again_s, report.caught_up_s) == (20, 24)
    assert (report.replayed_steps, report.differing_steps) == (4, 0)
    assert report.continued == "in the same allocation (job 7), restart 1 of its ranks"
    assert report_lines(report) == {
        "fault": "kill-rank: SIGKILL to rank 1 on n2",
        "happened": "the node agents restarted all ranks",
        "continued": "in the same allocation (job 7), restart 1 of its ranks",
        "steps": "reached 9, continued from 5: 4 lost",
        "seconds": "20.0 from the fault to the next step, 24.0 until it was past step 9",
        "kept": "checkpoints of step 5",
        "losses": "4 steps repeated, all with the same loss",
        "verdict": "recovered",
    }


@pytest.mark.parametrize(
    "job, expected", [("7", "as attempt 2, requeued as the same job 7"), ("8", "as attempt 2, submitted again as another job 8")]
)
def test_a_requeued_job_is_a_recovery(job: str, expected: str) -> None:
    attempts = {**REQUEUED.attempts, 2: Attempt(5, job=job, automatic=True)}
    report = judge(replace(REQUEUED, attempts=attempts), WHOLE)
    assert report.has_recovered
    assert report.continued == expected
    assert report.happened == "infrastructure: no record from n2"


def test_a_later_save_is_a_recovery_from_a_full_disk() -> None:
    report = judge(SAVED_AGAIN, frozenset({5, 20}))
    assert report.has_recovered
    assert report.continued == "training continued, and step 20 was saved once there was space again"
    assert "File too large" in report.happened
    never = replace(SAVED_AGAIN, committed=frozenset({5}))
    assert "did not train again" in problems(never, frozenset({5}))
    assert "no rank reported" in problems(replace(SAVED_AGAIN, errors=()), frozenset({5, 20}))


def test_a_run_that_needs_a_resume_is_reported() -> None:
    attempts = {1: Attempt(None), 2: Attempt(5)}
    report = judge(replace(REQUEUED, attempts=attempts, exits={}, resumed_attempt=2, ended_as="failed: the agent is gone"), WHOLE)
    assert report.has_recovered
    assert "as a user would" in report.continued
    assert report.happened == "failed: the agent is gone"


def test_a_preemption_with_notice_loses_nothing() -> None:
    report = judge(PREEMPTED, frozenset({5, 9}))
    assert report.has_recovered
    assert (report.lost_steps, report.replayed_steps) == (0, 0)
    assert report_lines(report)["losses"] == "no step was repeated"


def test_a_preemption_that_loses_steps_did_not_save() -> None:
    assert "the save after the signal was not committed" in problems(replace(PREEMPTED, steps=REQUEUED.steps))


def test_a_run_that_does_not_train_again_has_not_recovered() -> None:
    dead = replace(RESTARTED, steps=RESTARTED.steps[:9], last_status="failed: cluster.max_failures=2 is used up")
    assert problems(dead) == "the run did not train again: failed: cluster.max_failures=2 is used up"
    assert report_lines(judge(dead, WHOLE))["continued"] == "no"


def test_a_run_that_fails_again_has_not_recovered() -> None:
    short = replace(RESTARTED, steps=RESTARTED.steps[:12], last_status="failed: rank 1: killed by SIGKILL")
    assert "did not get past step 9: failed: rank 1" in problems(short)
    assert judge(short, WHOLE).trains_again_s == 20


def test_lost_checkpoints_are_distinguished_from_pruned_ones() -> None:
    committed = replace(RESTARTED, committed=frozenset({5, 10, 15, 20}))
    assert problems(committed, frozenset({15, 20})) == ""
    assert problems(committed, frozenset({20})) == "committed checkpoints are missing or damaged: step 15"
    assert problems(committed, frozenset({20, 25})) == ""


def test_resuming_from_an_older_checkpoint_is_a_problem() -> None:
    start_over = steps(1, 0, 1, 9, HIT_AT - 8) + steps(1, 1, 1, 10, HIT_AT + 20)
    assert "continued from step 0, although step 5 was saved" in problems(replace(RESTARTED, steps=start_over))


def test_different_losses_in_repeated_steps_are_a_problem_on_cpus() -> None:
    other = replace(RESTARTED, steps=RESTARTED.steps[:9] + steps(1, 1, 6, 10, HIT_AT + 20, shift=1e-6))
    assert "the losses of the repeated steps differ" in problems(other)
    on_gpus = judge(replace(other, device="cuda"), WHOLE)
    assert on_gpus.has_recovered
    assert on_gpus.differing_steps == 4
    assert report_lines(on_gpus)["losses"] == "4 steps repeated, 4 with a different loss (by at most 1e-06)"


def test_a_full_disk_must_be_named_in_an_alert() -> None:
    report = judge(DISK_FULL, WHOLE)
    assert report.has_recovered
    assert report.happened.startswith(
        "CheckpointError: the checkpoint could not be written where: rank 1, /runs/drill/checkpoints"
    )
    assert report.happened.endswith("value: File too large")
    in_ending = replace(DISK_FULL, errors=(), exits={1: ExitRecord("failed", message=FULL.format(folder=CHECKPOINTS, why="x"))})
    assert judge(in_ending, WHOLE).has_recovered
    assert "could not write a checkpoint" in problems(replace(DISK_FULL, errors=DISK_FULL.errors[:1]))


def test_the_json_report_has_the_verdict() -> None:
    values = json.loads(judge(DISK_FULL, WHOLE).to_json())
    assert values["has_recovered"] is True
    assert values["lost_steps"] == 4
    assert values["problems"] == []


def test_drill_help_lists_the_faults(launch: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = launch("drill", "--help")
    assert done.returncode == 0
    assert "python -m launcher drill" in done.stdout
    for fault in ("preempt", "kill-rank", "kill-node", "fill-disk", "hang"):
        assert f"\n  {fault} " in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--fault", "earthquake", "model=tiny"], "--fault cannot be earthquake"),
        (["model=tiny"], "--fault"),
        (["--fault", "hang", "--timeout", "0"], "--timeout"),
        (["--fault", "hang", "model=tiny", "checkpoint.save_every=1"], "checkpoint.save_every"),
        (["--fault", "hang", "model=tiny", "--steps", "6"], "raise --steps above 7"),
        (["--fault", "hang", "-m", "model=tiny", "optim.lr=1e-5,1e-4"], "a drill has only one run"),
        (["--fault", "hang", "model=tyni"], "there is no such option"),
        (["no-such-run", "--fault", "hang"], "there is no run named no-such-run"),
    ],
)
def test_invalid_drills_are_refused(
    launch_here: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str], message: str, tmp_path: object
) -> None:
    done = launch_here("drill", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
