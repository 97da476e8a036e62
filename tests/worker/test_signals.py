"""Signals to a process whose main thread is blocked in C, as in a collective that hangs."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launcher.worker.signals import DISMISSED

# pthread_mutex_lock keeps waiting after a signal handler has run, unlike most calls; so do gloo's condition variables.
STUCK = """
import ctypes, signal, subprocess, sys, threading, time
from launcher.worker.signals import StopFlag

def report():
    last = None
    while True:
        if flag() != last:
            last = flag()
            print(last, 0 <= time.monotonic() - flag.at < 5, flush=True)
        time.sleep(0.01)

print("born", flush=True)
sys.stdin.readline()
flag = StopFlag(loading="loading" in sys.argv).install()
if "training" in sys.argv:
    flag.begin_training()
helper = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
print(helper.pid, flush=True)
threading.Thread(target=report, daemon=True).start()
mutex, libc = (ctypes.c_char * 128)(), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)
"""


@contextmanager
def stuck(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The stuck process, and the process ID of a helper that it started."""
    command = [sys.executable, "-c", STUCK, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert said(process) == "born"
        install(process)
        helper = int(said(process))
        try:
            yield process, helper
        finally:
            send("KILL", helper)
            process.kill()


def install(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def send(name: str, pid: int) -> None:
    """Send the signal from a process that is not the receiver's parent."""
    subprocess.run(["bash", "-c", f"kill -{name} {pid}"], check=True, timeout=20)


@pytest.mark.parametrize("name, reason", [("USR1", "cancelled"), ("USR2", "preempted"), ("TERM", "preempted")])
def test_a_signal_sets_the_flag_inside_a_collective(name: str, reason: str) -> None:
    with stuck() as (process, _):
        send(name, process.pid)
        assert said(process) == f"{reason} True"


def test_a_cancel_while_loading_ends_the_process_at_once() -> None:
    with stuck("loading") as (process, _):
        send("USR1", process.pid)
        assert process.wait(20) == 0, "an exit without an outcome, which the agent does not take for a failure"


def test_a_preemption_while_loading_sets_the_flag() -> None:
    with stuck("loading") as (process, _):
        send("USR2", process.pid)
        assert said(process) == "preempted True"


def test_a_cancel_sets_the_flag_once_training_has_begun() -> None:
    with stuck("loading", "training") as (process, _):
        send("USR1", process.pid)
        assert said(process) == "cancelled True"


def test_the_first_reason_stays() -> None:
    with stuck() as (process, _):
        send("USR1", process.pid)
        assert said(process) == "cancelled True"
        for name in ("USR1", "USR2", "TERM", "INT"):
            send(name, process.pid)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.kill()
        assert said(process) == "", "no second reason"


def test_term_from_the_agent_ends_the_rank_at_once() -> None:
    with stuck() as (process, _):
        process.send_signal(signal.SIGUSR2)
        assert said(process) == "preempted True", "the agent's USR2 is a wish as anyone's"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == DISMISSED


def test_helper_processes_survive_the_signals_that_slurm_sends_to_a_step() -> None:
    with stuck() as (process, helper):
        for name in ("USR2", "TERM"):
            send(name, helper)
            send(name, process.pid)
        assert said(process) == "preempted True"
        with open(f"/proc/{helper}/stat") as stat:
            assert stat.read().rsplit(")", 1)[1].split()[0] == "S"


def test_a_rank_receives_signals_sent_before_it_listened() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        process = subprocess.Popen([sys.executable, "-c", STUCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    with process:
        assert said(process) == "born"
        send("USR2", process.pid)
        install(process)
        helper = int(said(process))
        assert said(process) == "preempted True"
        send("KILL", helper)
        process.kill()
