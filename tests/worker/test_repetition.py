"""An exception that repeats ends the run, whether it repeats across attempts or across restarts within one."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import hand_made
import pytest

from launcher import json_records, run_records, run_store
from launcher.config.sections.slurm import SlurmSection
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, FailureRecord, NodeRecord, RestartRecord
from launcher.worker import postmortem

RAISED = FailureRecord(3, "IndexError", "IndexError: as it says", at=100.0, exit_code=1, log="/log", step=43)
LOST_PEER = replace(RAISED, kind="RuntimeError", message="RuntimeError: [pair.cc:553] Connection closed by peer")
KILLED, CRASHED = (replace(RAISED, kind="killed", message=f"killed by {name}", step=None) for name in ("SIGKILL", "SIGSEGV"))
HUNG = replace(KILLED, message="(pid 7) is stopped by a signal (SIGSTOP): no progress for 9 s in step 44; killed it")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return hand_made.run(tmp_path / "demo", state="running", attempt=1, step=43)


@pytest.mark.parametrize(
    ("failures", "is_final"),
    [
        ([[RAISED, RAISED, RAISED]], True),
        ([[RAISED, RAISED], [RAISED]], True),
        ([[RAISED], [RAISED], [RAISED]], True),
        ([[RAISED, HUNG], [LOST_PEER, RAISED], [RAISED]], True),
        ([[RAISED], [RAISED]], False),
        ([[RAISED], [replace(RAISED, step=None)], [RAISED]], False),
        ([[HUNG] * 4, [HUNG] * 4], False),
        ([[CRASHED] * 4, [KILLED] * 4], False),
        ([[LOST_PEER] * 4, [LOST_PEER] * 4], False),
    ],
)
def test_only_an_exception_that_repeats_is_final_in_attempts_and_in_their_restarts(
    run: RunDir, failures: list[list[FailureRecord]], is_final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failures of each attempt: the last one ends the attempt, the others restart its ranks."""
    monkeypatch.setattr("launcher.plan.retry._MOST_WITHOUT_PROGRESS", 9)
    section = SlurmSection(max_failures=9, max_infrastructure_failures=9)
    conclusion = None
    for number, (*restarts, last) in enumerate(failures, 1):
        attempt = Attempt(None, job="41", nodes=("n1",), automatic=number > 1)
        run.attempt(number).mkdir(exist_ok=True)
        run_store.write_attempt(run, number, attempt)
        for count, restarted in enumerate(restarts, 1):
            assert not postmortem.describe_repetition(run, number, restarted)
            json_records.write(run_records.restart_file(run, number, count), RestartRecord(restarted, None))
        json_records.write(run_records.node_file(run, number, 0), NodeRecord(0, time.time(), first_failure=last))
        assert bool(postmortem.describe_repetition(run, number, last)) is (is_final and number == len(failures))
        conclusion = postmortem.conclude(run, number, attempt, section, exit_code=1)
        conclusion.record(run, number)
        assert conclusion.decision.again is not (is_final and number == len(failures))
    assert conclusion is not None
    assert ("it repeats" in conclusion.message) is is_final
