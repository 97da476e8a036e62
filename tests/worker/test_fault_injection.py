"""Faults injected into real processes that look like an agent and its ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pace import wait_for

from launcher.errors import RunError
from launcher.worker import fault_injection
from launcher.worker.ranks.rank_env import RankTitle

SLEEP = "import time; time.sleep(60)"
RANK = "import sys; from launcher.worker.ranks.rank_env import set_title; set_title(int(sys.argv[1]), *sys.argv[2:]); " + SLEEP


@pytest.fixture
def node(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The agent and ranks 2 and 3 of attempt 2 of `tmp_path / "run"`, then ranks of another attempt and of another run."""
    plan, other = f"{tmp_path}/run/plan.json", f"{tmp_path}/run2/plan.json"
    arguments = [(SLEEP, "launcher.worker.agent", plan, "2")]
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
