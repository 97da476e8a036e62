"""Rank 0 reports why the previous ranks failed, because their own message is only in the run's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hand_made
import pytest

from launcher import atomic_files, run_store
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking.jsonl import append_event
from launcher.train.previous_failure import RESTART, PreviousFailure, find_previous_failure

KILLED = {"rank": 3, "kind": "killed", "message": "killed by SIGKILL", "log": "/run/rank-00003.log"}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose second attempt started automatically after the first."""
    return hand_made.run(tmp_path / "demo", Attempt(None), Attempt(None, automatic=True))


def write_exit(run: RunDir, cause: str, first_failure: dict[str, Any] | None) -> None:
    record = {"state": "pending", "cause": cause, "message": "rank 3: killed by SIGKILL", "first_failure": first_failure}
    atomic_files.write_json(run.attempt(1) / "exit.json", record)


@pytest.mark.parametrize(
    ("cause", "first_failure", "message"),
    [
        ("infrastructure", KILLED, "rank 3: killed by SIGKILL (log: /run/rank-00003.log); this attempt continues the run"),
        ("bad_node", None, "attempt 1 ended (bad_node): rank 3: killed by SIGKILL; this attempt continues the run"),
        ("resized", None, ""),
    ],
)
def test_an_unreported_end_of_the_previous_attempt_is_reported(
    run: RunDir, cause: str, first_failure: dict[str, Any] | None, message: str
) -> None:
    write_exit(run, cause, first_failure)
    failure = find_previous_failure(run, 2)
    assert (failure is not None) == bool(message)
    assert failure is None or failure.message.endswith(message)
    assert failure is None or not failure.is_recorded
    assert find_previous_failure(run, 1) is None
    append_event(run, 1, "alert", f"the attempt ended ({cause}): rank 3: killed by SIGKILL; runs again")
    again = find_previous_failure(run, 2)
    assert again is None or again.is_recorded


def test_an_end_that_the_ranks_reported_is_not_reported_again(run: RunDir) -> None:
    write_exit(run, "preempted", None)
    failure = find_previous_failure(run, 2)
    assert failure is not None
    assert failure.message.startswith("attempt 1 ended (preempted)")
    atomic_files.write_json(run.attempt(1) / "outcome.json", {"reason": "preempted"})
    assert find_previous_failure(run, 2) is None


def test_an_attempt_that_a_person_started_gets_no_report(run: RunDir) -> None:
    write_exit(run, "infrastructure", KILLED)
    run_store.write_attempt(run, 2, Attempt(None))
    assert find_previous_failure(run, 2) is None


def test_restarted_ranks_report_the_last_reason(run: RunDir) -> None:
    write_exit(run, "infrastructure", KILLED)
    append_event(run, 1, "alert", "of another attempt", **{RESTART: 1})
    for count, reason in ((1, "the first"), (2, "the second")):
        append_event(run, 2, "alert", reason, **{RESTART: count})
    append_event(run, 2, "alert", "another matter")
    assert find_previous_failure(run, 2) == PreviousFailure("the second", is_recorded=True)


def test_unreported_gpu_faults_are_named(run: RunDir) -> None:
    write_exit(run, "infrastructure", None)
    append_event(run, 2, "alert", "Xid 94 on GPU 1: of another attempt")
    for gpu in range(3):
        append_event(run, 1, "alert", f"Xid 45 on GPU {gpu}: work was taken off the GPU (rank {gpu} on n1)")
    for _ in range(2):
        append_event(run, 1, "alert", "Xid 79 on GPU 3: fallen off the bus (rank 3 on n1)")
    failure = find_previous_failure(run, 2)
    assert failure is not None
    assert failure.message.endswith(
        "this attempt continues the run; GPU faults: Xid 79 on GPU 3: fallen off the bus (rank 3 on n1); Xid 45 on GPU 0: work "
        "was taken off the GPU (rank 0 on n1); Xid 45 on GPU 1: work was taken off the GPU (rank 1 on n1); 1 more"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_unreadable_events_do_not_stop_training(run: RunDir, text: str) -> None:
    (run.attempt(1) / "exit.json").write_text(text)
    assert find_previous_failure(run, 2) is None
