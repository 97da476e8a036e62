"""Which failure of a node's ranks is the first, and what a rank's record adds to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import atomic_files
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir
from launcher.run_records import FinalFailure
from launcher.worker import failure_record
from launcher.worker.failure_record import ERROR_MEMORY_VARIABLE, ErrorMemory, ErrorRecord, RankExit
from launcher.worker.signals import DISMISSED

RANK = """
from launcher.worker.ranks import rank_main

def fail(*_):
    raise ValueError("lost the connection to a peer \\ud800")

rank_main._run = fail
rank_main.main("plan.json", 1)
"""


def test_a_rank_leaves_its_exception_in_the_agents_memory(tmp_path: Path) -> None:
    memory = ErrorMemory(2)
    environment = os.environ | {ERROR_MEMORY_VARIABLE: str(memory.path), "LOCAL_RANK": "1"}
    with subprocess.Popen([sys.executable, "-c", RANK], env=environment, stderr=subprocess.DEVNULL) as rank:
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
    (run.attempt(1) / "final.json").write_text("{")
    assert failure_record.read_final(run, 1) is None
    final = {"rank": 1, "kind": "DataError", "message": "no rows", "at": 1.5}
    atomic_files.write_json(run.attempt(1) / "final.json", final)
    assert failure_record.read_final(run, 1) == FinalFailure(**final)


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
