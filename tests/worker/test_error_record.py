"""A rank's error record is complete or absent, and never changes how the rank ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from launcher import atomic_files, error_record, json_records
from launcher.error_record import VARIABLE, ErrorRecord
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir
from launcher.run_records import FinalFailure
from launcher.worker import failure_record
from launcher.worker.failure_record import RankExit
from launcher.worker.signals import DISMISSED

# A rank as launcher.worker.ranks.rank_main runs it, with a slow write of its record to disk.
RANK = """
import os, sys, time
from launcher.worker.ranks import rank_main

class Flag(rank_main.StopFlag):
    def __init__(self, loading):
        super().__init__(loading)
        global flag
        flag = self

def fsync(descriptor):
    print("writing", flush=True)
    # However late the signal comes, it comes in the middle.
    until = time.monotonic() + (20 if float(sys.argv[1]) else 0)
    while not flag._dismissed and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(float(sys.argv[1]))

def fail(*_):
    raise ValueError("lost the connection to a peer")

os.fsync, rank_main._run, rank_main.StopFlag = fsync, fail, Flag
rank_main.main("plan.json", 1)
"""


def dismissed_while_writing(path: Path, delay_s: float) -> tuple[int, float]:
    """Terminate a rank while it writes, as its agent does; returns the exit code, and the seconds until the rank ended."""
    command = [sys.executable, "-c", RANK, str(delay_s)]
    environment = os.environ | {VARIABLE: str(path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as rank:
        try:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "writing\n"
            rank.send_signal(signal.SIGTERM)
            began = time.monotonic()
            return rank.wait(timeout=20), time.monotonic() - began
        finally:
            rank.kill()


def test_a_rank_that_is_terminated_while_it_writes_completes_its_error_record(tmp_path: Path) -> None:
    path, before = tmp_path / "error.json", time.time()
    assert dismissed_while_writing(path, 0.3)[0] == DISMISSED
    error = ErrorRecord.read(path)
    assert error is not None
    assert error.message == "ValueError: lost the connection to a peer"
    assert "in fail" in error.traceback
    assert error.at is not None
    assert before < error.at < time.time()
    # An error that the launcher does not expect keeps its traceback.
    failed = failure_record.from_exit(RankExit(0, 1, error.at, error), RunDir(tmp_path), 1)
    assert failed.kind == "ValueError"
    assert "in fail" in failed.traceback


def test_slow_storage_delays_a_terminated_rank_by_a_second_at_most(tmp_path: Path) -> None:
    code, seconds = dismissed_while_writing(tmp_path / "error.json", 60)
    assert code == DISMISSED
    assert 0.5 < seconds < 5
    assert not (tmp_path / "error.json").exists()


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    error = ErrorRecord("OSError: a lone \ud800 and \x00", "Traceback\n  a line", 1700000000.25)
    error.write(tmp_path / "error.json")
    assert ErrorRecord.read(tmp_path / "error.json") == error
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_a_full_disk_leaves_no_record_and_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "error.json"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        error_record.write_error_record(ErrorRecord.of(ValueError("its own")), {VARIABLE: str(path)})
    assert not path.exists()
    assert "No space left on device" in capsys.readouterr().err


def test_a_rank_that_cannot_write_its_record_still_ends_by_its_exception(tmp_path: Path) -> None:
    (tmp_path / "no-folder").touch()
    environment = os.environ | {VARIABLE: str(tmp_path / "no-folder/error.json")}
    done = subprocess.run([sys.executable, "-c", RANK, "0"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Not a directory" in done.stderr
    assert done.stderr.endswith("ValueError: lost the connection to a peer\n")


BAD = {
    "empty": b"",
    "cut off": b'{"message": {"message": "RuntimeError: Conn',
    "not JSON": b"<html>",
    "not text": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"1" * 5000,
    "without a message": b'{"massage": 1}',
    "a message of another shape": b'{"message": {"message": ["text"]}}',
    "nested too deep": b"[" * 100_000,
}


@pytest.fixture(params=BAD)
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "error.json"
    path.write_bytes(BAD[request.param])
    return path


def test_a_damaged_record_counts_as_none_and_the_exit_code_describes_the_end(bad: Path) -> None:
    assert ErrorRecord.read(bad) is None
    run = RunDir(bad.parent)
    failed = failure_record.from_exit(RankExit(3, 1, 1.0, ErrorRecord.read(bad)), run, 1)
    assert (failed.rank, failed.message, failed.traceback) == (3, "ended with exit code 1 and left no record of an error", "")
    killed = failure_record.from_exit(RankExit(3, -signal.SIGKILL, 1.0, None), run, 1)
    assert (killed.kind, killed.message) == ("killed", "killed by SIGKILL")
    assert failure_record.from_exit(RankExit(3, -50, 1.0, None), run, 1).message == "killed by signal 50", (
        "a signal without a name"
    )


def test_an_unreadable_record_counts_as_none(tmp_path: Path, storage_fails: Callable[..., AbstractContextManager[None]]) -> None:
    path = tmp_path / "error.json"
    assert ErrorRecord.read(path) is None
    path.mkdir()
    assert ErrorRecord.read(path) is None
    path = tmp_path / "other.json"
    ErrorRecord("ValueError: its own").write(path)
    with storage_fails(path, errno.EIO):
        assert ErrorRecord.read(path) is None
    assert ErrorRecord.read(path) == ErrorRecord("ValueError: its own")


@pytest.mark.parametrize("timestamp", ["soon", [], None, "1e999"])
def test_a_record_without_a_time_keeps_its_message(tmp_path: Path, timestamp: object) -> None:
    path = tmp_path / "error.json"
    path.write_text(json.dumps({"message": {"message": "ValueError: x", "extraInfo": {"timestamp": timestamp}}}))
    assert ErrorRecord.read(path) == ErrorRecord("ValueError: x")
    path.write_text(json.dumps({"message": {"message": "ValueError: x", "extraInfo": "none"}}))
    assert ErrorRecord.read(path) == ErrorRecord("ValueError: x")


def test_a_damaged_final_failure_counts_as_none(bad: Path) -> None:
    run = RunDir(bad.parent)
    run.attempt(1).mkdir(parents=True)
    bad.rename(run.attempt(1) / "final.json")
    assert failure_record.read_final(run, 1) is None
    atomic_files.write_json(
        run.attempt(1) / "final.json", final := {"rank": 1, "kind": "DataError", "message": "no rows", "at": 1.5}
    )
    assert failure_record.read_final(run, 1) == FinalFailure(**final)


def test_a_run_file_that_is_not_utf8_raises_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(b"\xff")
    with pytest.raises(RunError, match="damaged") as error:
        json_records.read_json(tmp_path / "status.json")
    # The error keeps its own message: it is not attributed to a limit of the machine that was reached meanwhile.
    end = RankExit(3, 1, 1.0, ErrorRecord.of(error.value))
    failed = failure_record.from_rank_exits([end], RunDir(tmp_path), 1, limit="its memory limit was met")
    assert (failed.message, failed.traceback) == (str(error.value), "")


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
