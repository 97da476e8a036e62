"""Ctrl-C while a process of the worker side runs: it ends, removes what it was writing, and prints nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hand_made
import pytest

from launcher import run_store
from launcher.cli import launch
from launcher.cli.follow import interrupted_start
from launcher.cli.interrupts import Interrupts
from launcher.cli.launch import start
from launcher.cli.worker_process import run_worker
from launcher.clusters.local import LocalCluster
from launcher.errors import EXIT_INTERRUPTED
from launcher.plan.run_dir import RunDir

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


class InterruptedCluster(LocalCluster):
    """The user presses Ctrl-C while the run is submitted."""

    def submit(self, run: RunDir, attempt: int, plan: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_while_a_run_is_submitted_waits_until_the_run_can_be_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.defer()
        run, attempt = start(hand_made.plan(tmp_path / "runs/demo", hand_made.SETTINGS), InterruptedCluster())
        assert interrupts.received == [signal.SIGINT]
        assert (attempt, run_store.read_status(run).state) == (1, "pending")
        assert interrupted_start(run) == EXIT_INTERRUPTED
        assert capsys.readouterr().out.endswith(f"stop it with: python -m launcher cancel {run.root}\n")
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), Interrupts():
        os.kill(os.getpid(), signal.SIGINT)


def test_after_an_interrupt_no_other_run_of_a_sweep_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "cluster_for", lambda kind: InterruptedCluster())
    names = ("one", "two", "three")
    plans = [hand_made.plan(tmp_path / name, hand_made.SETTINGS).model_copy(update={"run_name": name}) for name in names]
    assert launch.start_all(plans, follows=False) == EXIT_INTERRUPTED
    assert capsys.readouterr().out.endswith("not started: two, three\n")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_an_interrupt_during_the_imports_prints_no_traceback() -> None:
    code = (
        "import os, runpy, signal, sys\n"
        "class Now:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'launcher.cli.main': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Now())\n"
        "runpy.run_module('launcher', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
