"""The journal of an attempt: what is written is read back, whatever else is in the files."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from launcher.errors import Problem, UnreadableRun
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.runs import journal
from launcher.runs.journal import (
    AttemptConcluded,
    Event,
    FailureRecord,
    NodeEnded,
    NodeLost,
    RanksRestarted,
    RepeatableFailure,
    StatusChanged,
    TrainingEnded,
)
from launcher.runs.run_records import Status

FAILURE = FailureRecord(3, "ValueError", "ValueError: own", at=1.5, exit_code=1, traceback="Traceback", log="/log")
PROBLEM = Problem("has no GPU", "n2", "0", "repair")
TRAINING = TrainingEnded(state="completed", reason="completed", step=100, message="done", checkpoint="/checkpoint")
NODE = NodeEnded(node=1, host="n2", killed=True, first_failure=FAILURE, problems=(PROBLEM,))
ENDED = AttemptConcluded(state="pending", cause=Cause.BAD_NODE, step=40, message="lost\r\nmore", bad_nodes=("n2",))
EVENTS: tuple[tuple[Event, str], ...] = (
    (TRAINING, "rank-00000"),
    (RepeatableFailure(failure=FAILURE), "rank-00003"),
    (RanksRestarted(first_failure=FAILURE, saved_step=20), "node-00000"),
    (NODE, "node-00001"),
    (NodeLost(node=0, text="n1 was lost: Connection timed out"), "lost-00000"),
    (ENDED, "attempt"),
    (StatusChanged(status=Status("running", 1, 20, 40, {"pid": 7, "host": "n1"}, "loading", 1.0, 2.0)), "attempt"),
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.attempt(1).mkdir(parents=True)
    return run


def test_every_kind_of_event_has_its_writer_and_is_read_as_it_was_written(run: RunDir) -> None:
    assert {type(event) for event, _ in EVENTS} == {*journal.KINDS.values()}
    for event, _ in EVENTS:
        journal.append(run, 1, event)
    read = journal.read(run, 1)
    assert sorted(map(repr, read)) == sorted(repr(event) for event, _ in EVENTS)
    assert {path.stem for path in (run.attempt(1) / "journal").iterdir()} == {writer for _, writer in EVENTS}


def test_the_state_of_an_attempt_is_what_its_events_add_up_to(run: RunDir) -> None:
    state = journal.fold(event for event, _ in EVENTS)
    assert (state.training, state.repeatable, state.nodes, state.ended) == (TRAINING, FAILURE, {1: NODE}, ENDED)
    assert len(state.restarts) == 1
    assert journal.fold([]) == journal.AttemptState() == journal.read_state(run, 1)
    # The last verdict counts; of failures that a restart would repeat, the first.
    late = RepeatableFailure(failure=dataclasses.replace(FAILURE, rank=0), at=time.time() + 9)
    again = journal.fold([late, ENDED, RepeatableFailure(failure=FAILURE), dataclasses.replace(ENDED, ended_at=2.0)])
    assert (again.repeatable, again.ended) == (FAILURE, dataclasses.replace(ENDED, ended_at=2.0))


@pytest.mark.parametrize(
    "damage",
    [b"", b"\n", b"{", b"[]\n", b"null\n", b"\xff\xfe\n", b'{"kind": "Weather"}\n', b'{"kind": "AttemptConcluded"}\n'],
)
def test_damage_takes_nothing_else_with_it(run: RunDir, damage: bytes) -> None:
    """Of an event that another version wrote, unknown keys are ignored, and absent ones get their defaults."""
    journal.append(run, 1, ENDED)
    file = run.attempt(1) / "journal/attempt.jsonl"
    file.write_bytes(file.read_bytes() + damage)
    assert journal.read_end(run, 1) == ENDED
    journal.append(run, 1, dataclasses.replace(ENDED, step=41))
    verdict = {"kind": "AttemptConcluded", "state": "failed", "cause": "failure", "weather": "fine"}
    assert journal.read(run, 1) == [ENDED, dataclasses.replace(ENDED, step=41)]
    file.write_bytes(damage if damage.endswith(b"\n") else damage + b"\n")
    file.write_bytes(file.read_bytes() + json.dumps(verdict).encode())
    assert journal.read_end(run, 1) == AttemptConcluded(state="failed", cause=Cause.FAILURE)


def test_a_journal_that_storage_does_not_give_out_is_not_an_empty_one(run: RunDir) -> None:
    (run.attempt(1) / "journal/attempt.jsonl").mkdir(parents=True)
    with pytest.raises(UnreadableRun, match="a file of the run cannot be read: Is a directory"):
        journal.read_end(run, 1)


def test_the_state_of_a_large_attempt_is_read_in_milliseconds(run: RunDir) -> None:
    """128 nodes report a failure, and 8 of 1,024 ranks wrote before they saw that another had."""
    trace = "\n".join(["line of a traceback" * 4] * 40)
    for node in range(128):
        journal.append(run, 1, NodeEnded(node=node, first_failure=dataclasses.replace(FAILURE, traceback=trace)))
    for rank in range(8):
        journal.append(run, 1, RepeatableFailure(failure=dataclasses.replace(FAILURE, rank=rank)))
    began = time.process_time()
    assert len(journal.read_state(run, 1).nodes) == 128
    assert time.process_time() - began < 0.5
