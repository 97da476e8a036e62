"""The pipe through which a silent rank is asked for NCCL's flight recorder; a test plays torch's end of it."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.worker.ranks.flight_recorder import FlightRecorder


def test_a_request_arrives_in_the_pipe_that_torch_reads(tmp_path: Path) -> None:
    environ = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}
    recorder = FlightRecorder(tmp_path / "nccl", is_nccl=True)
    recorder.set_variables(environ)
    assert environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7", "the user's own"
    assert environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/nccl/rank-"
    # As DumpPipe in torch's ProcessGroupNCCL.
    pipe = Path(environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + "3.pipe")
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    recorder.request(3)
    recorder.request(4)
    assert os.read(reading, 16) == b"1\n"
    os.close(reading)
    # Nobody reads: the request does not wait.
    recorder.request(3)
    recorder.close(environ)
    assert not pipe.parent.exists()
    assert list(environ) == ["TORCH_NCCL_TRACE_BUFFER_SIZE"]


def test_without_nccl_nothing_is_recorded(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    recorder = FlightRecorder(tmp_path / "nccl", is_nccl=False)
    recorder.set_variables(environ)
    recorder.request(0)
    recorder.close(environ)
    assert environ == {}
    assert not (tmp_path / "nccl").exists()
