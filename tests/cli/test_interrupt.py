"""Ctrl-C while a process of the worker side runs: it ends, removes what it was writing, and prints nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.cli.worker_process import run_worker

# Writes a file until it is ended, as a build of the data cache does, in processes of its own.
WORKER = """
import multiprocessing, os, pathlib, signal, sys, time
from launcher.worker.signals import exit_on_termination

exit_on_termination()
folder = pathlib.Path(sys.argv[1])
try:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    (folder / "child").write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGINT)
    (folder / "partial").write_text("half")
    time.sleep(60)
finally:
    (folder / "partial").unlink()
"""


def interrupt_after(file: Path) -> None:
    until = time.monotonic() + 30
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_worker_removes_what_it_was_writing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    thread = threading.Thread(target=interrupt_after, args=(tmp_path / "partial",))
    thread.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_worker([sys.executable, "-c", WORKER, str(tmp_path)])
    thread.join()
    assert time.monotonic() - started < 45, "it was not waited for"
    assert not (tmp_path / "partial").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)
    assert capfd.readouterr() == ("", "")


def test_a_worker_answers_with_its_exit_code_and_output(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print(sys.stdin.read() + '!'); sys.exit(3)"
    assert run_worker([sys.executable, "-c", code], "hello", -1) == (3, "hello!\n")
    assert run_worker([sys.executable, "-c", code], "hello") == (3, "")
    assert capfd.readouterr().out == "hello!\n"
