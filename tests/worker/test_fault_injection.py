"""Faults injected into real processes that look like an agent and its ranks."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launcher import run_store
from launcher.clusters.faults import InjectedFault
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir
from launcher.run_records import Status
from launcher.tracking.jsonl import JsonlTracker
from launcher.worker import fault_injection
from launcher.worker.ranks.rank_env import RankTitle

SLEEP = "import time; time.sleep(60)"
RANK = "import sys; from launcher.worker.ranks.rank_env import set_title; set_title(int(sys.argv[1]), *sys.argv[2:]); " + SLEEP


@dataclass(frozen=True)
class Node:
    run: RunDir
    agent: subprocess.Popen[bytes]
    ranks: tuple[subprocess.Popen[bytes], ...]

    @property
    def plan(self) -> SimpleNamespace:
        """The attributes of a plan that the faults read."""
        checkpoint = SimpleNamespace(save_every=5)
        topology = SimpleNamespace(world_size=4)
        return SimpleNamespace(
            run_dir=str(self.run.root), checkpoint_bytes=8000, topology=topology, config=SimpleNamespace(checkpoint=checkpoint)
        )


def agent_process(run: RunDir, attempt: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SLEEP, "launcher.worker.agent", str(run.plan), str(attempt)])


def rank_process(run: RunDir, attempt: int, rank: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(run.plan), str(attempt)])


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Ranks 2 and 3 of attempt 2, next to processes of another attempt and another run."""
    run, other = RunDir(tmp_path / "run"), RunDir(tmp_path / "run2")
    run.root.mkdir()
    agent = agent_process(run, 2)
    ranks = tuple(rank_process(run, 2, rank) for rank in (2, 3))
    others = [rank_process(run, 1, 4), rank_process(other, 2, 5)]
    every = [agent, *ranks, *others]
    # Until a forked child has called exec, it shows its parent's command line.
    deadline = time.monotonic() + 30
    while any(psutil.Process(p.pid).cmdline()[1:2] != ["-c"] for p in every[:1]) or any(
        RankTitle.of(psutil.Process(p.pid)) is None for p in every[1:]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield Node(run, agent, ranks)
    for p in every:
        p.kill()
        p.wait(timeout=10)


def test_only_processes_of_this_attempt_are_found(node: Node) -> None:
    found = fault_injection.find(node.run, 2)
    assert found.agent.pid == node.agent.pid
    assert {rank: p.pid for rank, p in found.ranks.items()} == {2: node.ranks[0].pid, 3: node.ranks[1].pid}
    with pytest.raises(RunError, match="attempt 3 has no agent"):
        fault_injection.find(node.run, 3)


@pytest.mark.parametrize(
    "action, victim, number",
    [
        (fault_injection.preempt, 0, signal.SIGUSR2),
        (fault_injection.kill_node, 0, signal.SIGKILL),
        (fault_injection.kill_rank, 2, signal.SIGKILL),
    ],
)
def test_a_fault_signals_only_one_process(node: Node, action, victim: int, number: signal.Signals) -> None:  # type: ignore[no-untyped-def]
    processes = [node.agent, *node.ranks]
    before = time.time()
    fault = action(fault_injection.find(node.run, 2), node.plan)
    assert processes[victim].wait(timeout=10) == -number
    assert fault.pids == (processes[victim].pid,)
    assert before <= fault.at <= time.time()
    assert [p.poll() for p in processes if p is not processes[victim]] == [None, None]


def test_the_full_disk_fault_limits_files_to_half_a_shard(node: Node) -> None:
    fault = fault_injection.fill_disk(fault_injection.find(node.run, 2), node.plan)
    assert fault.description == "no file of ranks 2, 3 can grow beyond 1,000 bytes"
    for rank in node.ranks:
        assert psutil.Process(rank.pid).rlimit(psutil.RLIMIT_FSIZE)[0] == 1000
    assert psutil.Process(node.agent.pid).rlimit(psutil.RLIMIT_FSIZE) == resource.getrlimit(resource.RLIMIT_FSIZE)
    fault_injection.free_disk(fault_injection.find(node.run, 2), node.plan)
    for rank in node.ranks:
        assert psutil.Process(rank.pid).rlimit(psutil.RLIMIT_FSIZE) == resource.getrlimit(resource.RLIMIT_FSIZE)


def test_the_hang_fault_stops_no_rank_that_may_be_saving(node: Node) -> None:
    run_store.write_status(node.run, Status(state="running", attempt=2, step=9))
    log = JsonlTracker(node.run, 2)
    log.log(10, {"train/loss": 1.0})
    done: list[InjectedFault] = []
    worker = threading.Thread(target=lambda: done.append(fault_injection.hang(fault_injection.find(node.run, 2), node.plan)))
    worker.start()
    time.sleep(1.2)
    assert not done
    log.log(11, {"train/loss": 1.0})
    worker.join(timeout=10)
    assert done[0].description == "SIGSTOP to rank 3"
    assert psutil.Process(node.ranks[1].pid).status() == psutil.STATUS_STOPPED
    assert psutil.Process(node.ranks[0].pid).status() != psutil.STATUS_STOPPED
    assert time.time() - done[0].at < 5


def test_a_fault_that_cannot_be_injected_is_reported_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden/tiny.plan.json").read_text())
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({**golden, "run_dir": str(tmp_path)}))
    assert fault_injection.main(["kill-rank", str(plan), "1"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "attempt 1 has no agent with ranks" in said.err
