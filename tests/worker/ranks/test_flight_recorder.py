"""A silent rank is asked through a pipe for its flight recorder, and the agent says in which collective the ranks hang."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from forked_ranks import RankServer
from pace import wait_for

from launcher import run_store
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.worker.ranks.flight_recorder import FlightRecorder
from launcher.worker.ranks.hung_collective import parse_dump

STALL_S = 600.0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.attempts.mkdir()
    run_store.create_attempt(run, Attempt(None, nodes=("n1", "n2", "n3")))
    return run


def test_a_request_arrives_in_the_pipe_that_torch_reads(run: RunDir) -> None:
    environ = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}
    recorder = FlightRecorder(run, 1, 4, STALL_S)
    recorder.set_variables(environ)
    assert environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7", "the user's own"
    # As DumpPipe in torch's ProcessGroupNCCL.
    pipe = Path(environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + "3.pipe")
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    recorder.request(3)
    recorder.request(2)
    assert os.read(reading, 16) == b"1\n"
    os.close(reading)
    # Nobody reads: the request does not wait.
    recorder.request(3)
    assert recorder.explain() == ""
    recorder.close(environ)
    assert not pipe.parent.exists()
    assert list(environ) == ["TORCH_NCCL_TRACE_BUFFER_SIZE"]


def test_the_collective_is_named_that_ranks_wait_in_and_who_has_not_called_it(
    rank_server: RankServer, run: RunDir, tmp_path: Path
) -> None:
    """Real records of three ranks over gloo; the last one has not called what the others wait in, and later answers no more."""
    environ: dict[str, str] = {}
    recorder = FlightRecorder(run, 1, 3, STALL_S)
    recorder.set_variables(environ)
    values: list[list[None]] = []
    arguments = [[2, str(tmp_path)]] * 3
    ranks = threading.Thread(
        target=lambda: values.append(
            rank_server.values("waiting_ranks:wait_without", arguments, tmp_path / "ranks", environment=environ)
        )
    )
    ranks.start()
    published = run.attempt(1) / "collectives"
    # Of a rank before its restart: too old to count.
    published.mkdir()
    (published / "rank-2").write_bytes(b"")
    os.utime(published / "rank-2", (0, 0))
    try:
        wait_for("the ranks", lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(3)))
        title = "rank 0 on n1, rank 1 on n2 wait in collective 3 of process group 0 (default_pg), all_gather of 12.0 KiB"

        def explain(*asked: int) -> str:
            for rank in asked:
                recorder.request(rank)
            wait_for("their records", lambda: all((published / f"rank-{rank}").exists() for rank in asked))
            return recorder.explain()

        # The others may not have called it yet.
        wait_for("the others", lambda: explain(0, 1) == f"{title}; rank 2 on n3 did not answer")
        assert explain(0, 1, 2) == f"{title}; rank 2 on n3 has not called it"
    finally:
        (tmp_path / "go").touch()
        ranks.join()
        recorder.close(environ)
    assert values == [[None] * 3], "recording changes nothing"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_rank_with_nccl_answers_by_itself(rank_server: RankServer, run: RunDir, tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    recorder = FlightRecorder(run, 1, 1, STALL_S)
    recorder.set_variables(environ)
    function, arguments = "waiting_ranks:record_on_a_gpu", [[str(tmp_path)]]
    rank = threading.Thread(target=lambda: rank_server.values(function, arguments, tmp_path / "ranks", environment=environ))
    rank.start()
    written = run.attempt(1) / "collectives" / "rank-0"
    try:
        wait_for("the rank", (tmp_path / "ready-0").exists)
        recorder.request(0)
        wait_for("its record", written.exists)
        assert recorder.explain() == "", "it waits in no collective"
    finally:
        (tmp_path / "go").touch()
        rank.join()
        recorder.close(environ)
    recorded = parse_dump(written.read_bytes())
    assert recorded is not None
    ((group, (summed,)),) = recorded.collectives.items()
    assert (group, summed.name, summed.num_bytes, summed.is_completed) == ("0 (default_pg)", "all_reduce", 4096, True)
    assert recorded.members[group] == {0}


def test_storage_that_does_not_answer_keeps_no_watchdog_waiting(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    published = run.attempt(1) / "collectives"
    published.mkdir()
    # Opening it waits for a writer.
    os.mkfifo(published / "rank-0")
    monkeypatch.setattr("launcher.worker.ranks.flight_recorder._READING_S", 0.2)
    recorder = FlightRecorder(run, 1, 1, STALL_S)
    began = time.monotonic()
    assert recorder.explain() == ""
    assert time.monotonic() - began < 60
    with open(published / "rank-0", "wb"):
        recorder.close({})
