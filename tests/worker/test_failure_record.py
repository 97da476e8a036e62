"""Which failure of a node's ranks is the first, which exceptions repeat, and faults injected into processes like ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hand_made
import psutil
import pytest
from pace import wait_for

from launcher.config.sections.slurm import SlurmSection
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.runs.journal import FailureRecord, NodeEnded, RanksRestarted, RepeatableFailure
from launcher.runs.run_records import Attempt
from launcher.worker import failure_record, fault_injection, postmortem
from launcher.worker.failure_record import ERROR_MEMORY_VARIABLE, ErrorMemory, ErrorRecord, RankExit
from launcher.worker.ranks.rank_env import RankTitle
from launcher.worker.signals import DISMISSED

FAILING_RANK = """
from launcher.worker.ranks import rank_main

def fail(*_):
    raise ValueError("lost the connection to a peer \\ud800")

rank_main.RankEnv.from_environ = fail
rank_main.main("plan.json", 1)
"""
RAISED = FailureRecord(3, "IndexError", "IndexError: as it says", at=100.0, exit_code=1, log="/log", step=43)
LOST_PEER = replace(RAISED, kind="RuntimeError", message="RuntimeError: [pair.cc:553] Connection closed by peer")
SLEEP = "import time; time.sleep(60)"
RANK = "import sys; from launcher.worker.ranks.rank_env import set_title; set_title(int(sys.argv[1]), *sys.argv[2:]); " + SLEEP


def test_a_rank_leaves_its_exception_in_the_agents_memory(tmp_path: Path) -> None:
    memory = ErrorMemory(2)
    environment = os.environ | {ERROR_MEMORY_VARIABLE: str(memory.path), "LOCAL_RANK": "1"}
    with subprocess.Popen([sys.executable, "-c", FAILING_RANK], env=environment, stderr=subprocess.DEVNULL) as rank:
        assert rank.wait(60) == 1
    error = memory.read(1, rank.pid)
    assert error is not None
    assert error.message == "ValueError: lost the connection to a peer \ud800"
    assert memory.read(0, rank.pid) is None
    assert memory.read(1, rank.pid + 1) is None, "of another start of the rank"
    memory.close()
    # An error that the launcher does not expect keeps its traceback.
    failed = failure_record.from_exit(RankExit(0, 1, 1.0, error), RunDir(tmp_path), 1)
    assert failed.kind == "ValueError"
    assert "in fail" in failed.traceback


@pytest.mark.parametrize(
    "code, message",
    [
        (1, "ended with exit code 1 and left no record of an error"),
        (-9, "killed by SIGKILL"),
        (-50, "killed by signal 50"),
    ],
)
def test_the_exit_code_describes_the_end_of_a_rank_without_a_record(tmp_path: Path, code: int, message: str) -> None:
    assert failure_record.from_exit(RankExit(3, code, 1.0, None), RunDir(tmp_path), 1).message == message


def test_a_damaged_final_failure_counts_as_none(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.attempt(1).mkdir(parents=True)
    final = FailureRecord(1, "DataError", "no rows", at=1.5)
    journal.append(run, 1, RepeatableFailure(failure=replace(final, rank=0), at=0.5))
    (run.attempt(1) / "journal/rank-00000.jsonl").write_text("{")
    assert failure_record.read_final(run, 1) is None
    journal.append(run, 1, RepeatableFailure(failure=final, at=1.5))
    journal.append(run, 1, RepeatableFailure(failure=replace(final, rank=2), at=2.5))
    assert failure_record.read_final(run, 1) == final


def test_an_error_of_the_launcher_is_not_attributed_to_a_limit(tmp_path: Path) -> None:
    end = RankExit(3, 1, 1.0, ErrorRecord.of(RunError("a file of the run is damaged")))
    failed = failure_record.from_rank_exits([end], RunDir(tmp_path), 1, limit="its memory limit was met")
    assert (failed.message, failed.traceback) == ("a file of the run is damaged", "")


def exits(*ends: tuple[int, int, float, str | None]) -> list[RankExit]:
    return [RankExit(rank, code, at, error and ErrorRecord(error, at=at)) for rank, code, at, error in ends]


@pytest.mark.parametrize(
    "ends, rank, message",
    [
        ([(0, 1, 9.0, "RuntimeError: Connection closed by peer"), (1, -9, 10.0, None)], 1, "killed by SIGKILL"),
        ([(0, 1, 9.0, "ValueError: later"), (1, 1, 8.9, "ValueError: first")], 1, "ValueError: first"),
        ([(0, DISMISSED, 9.0, "RuntimeError: Connection closed by peer"), (1, 1, 9.5, "ValueError: own")], 1, "ValueError: own"),
        # The agent itself kills ranks that do not end within half a minute.
        ([(0, 1, 9.0, "ValueError: own"), (1, -9, 39.0, None)], 0, "ValueError: own"),
        ([(0, DISMISSED, 9.0, None), (1, 7, 9.0, None)], 1, "ended with exit code 7 and left no record of an error"),
    ],
)
def test_the_first_failure_is_the_cause_and_not_its_consequences(
    tmp_path: Path, ends: list[tuple[int, int, float, str | None]], rank: int, message: str
) -> None:
    first = failure_record.from_rank_exits(exits(*ends), RunDir(tmp_path), 1)
    assert (first.rank, first.message) == (rank, message)
    assert first.line == f"rank {rank}: {message}"


def test_a_cause_keeps_a_long_path_and_still_fits_into_its_slot() -> None:
    memory = failure_record.ErrorMemory(1)
    slot = failure_record.ErrorSlot.from_environ({failure_record.ERROR_MEMORY_VARIABLE: str(memory.path)})
    cause = f"the disk of /{'runs/' * 40} is full (0 bytes of 200.00 MiB free)"
    slot.write(failure_record.ErrorRecord.of(OSError("disk"), cause))
    kept = memory.read(0, os.getpid())
    assert kept is not None
    assert kept.cause == cause
    slot.write(failure_record.ErrorRecord("\0" * 5000, "\0" * 5000, 1.0, "\0" * 800, 1))
    assert memory.read(0, os.getpid()) is not None
    memory.close()


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
        for restarted in restarts:
            assert not postmortem.describe_repetition(run, number, restarted)
            journal.append(run, number, RanksRestarted(first_failure=restarted, saved_step=None))
        journal.append(run, number, NodeEnded(node=0, first_failure=last))
        assert bool(postmortem.describe_repetition(run, number, last)) is (is_final and number == len(failures))
        conclusion = postmortem.conclude(run, number, attempt, section, postmortem.Evidence(exit_code=1))
        journal.append(run, number, conclusion.verdict())
        assert conclusion.decision.again is not (is_final and number == len(failures))
    assert conclusion is not None
    assert ("it repeats" in conclusion.message) is is_final


@pytest.fixture
def node(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The agent and ranks 2 and 3 of attempt 2 of `tmp_path / "run"`, then ranks of another attempt and of another run."""
    plan, other = f"{tmp_path}/run/plan.json", f"{tmp_path}/run2/plan.json"
    arguments = [(SLEEP, "launcher.worker.local", plan, "2")]
    of_ranks = [(plan, "2"), (plan, "2"), (plan, "1"), (other, "2")]
    arguments += [(RANK, rank, *of) for rank, of in zip("2345", of_ranks, strict=True)]
    started = [subprocess.Popen([sys.executable, "-c", *words]) for words in arguments]
    # Until a forked child has called exec, it shows its parent's command line.
    wait_for("the agent", lambda: psutil.Process(started[0].pid).cmdline()[1:2] == ["-c"], 30)
    wait_for("the ranks", lambda: all(RankTitle.of(psutil.Process(p.pid)) for p in started[1:]), 30)
    yield started
    for process in started:
        process.kill()
        process.wait(timeout=10)


@pytest.mark.parametrize(
    "fault, victim, number",
    [("preempt", 0, signal.SIGUSR2), ("kill-node", 0, signal.SIGKILL), ("kill-rank", 2, signal.SIGKILL)],
)
def test_a_fault_signals_one_process_of_the_attempt(
    node: list[subprocess.Popen[bytes]], tmp_path: Path, fault: str, victim: int, number: signal.Signals
) -> None:
    before = time.time()
    injected = fault_injection.inject(fault, tmp_path / "run", 2)
    assert node[victim].wait(timeout=10) == -number
    assert before <= injected.at <= time.time()
    assert [process.poll() for process in node if process is not node[victim]] == [None] * 4


def test_a_hang_stops_the_last_rank_and_an_attempt_without_processes_is_refused(
    node: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    assert fault_injection.inject("hang", tmp_path / "run", 2).description == "SIGSTOP to rank 3"
    # A signal to another process is delivered a moment later.
    wait_for("the stop", lambda: psutil.Process(node[2].pid).status() == psutil.STATUS_STOPPED, 10)
    with pytest.raises(RunError, match="attempt 3 has no agent"):
        fault_injection.find(tmp_path / "run", 3)
