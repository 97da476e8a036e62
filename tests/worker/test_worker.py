from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hand_made
import pytest
from fake_nvml import H100, OTHER, driver
from hand_made import event_texts

from launcher.clusters import detached_process
from launcher.clusters.local import LocalCluster
from launcher.errors import RunError
from launcher.plan.gpu_types import Price
from launcher.plan.launch_plan import Topology
from launcher.runs import run_store
from launcher.runs.run_records import Attempt
from launcher.tracking import goodput
from launcher.tracking.jsonl import read_events
from launcher.worker import local, supervise
from launcher.worker.checks import gpus, machine
from launcher.worker.ranks.rank_env import RankEnv
from launcher.worker.signals import CANCEL

pytestmark = pytest.mark.rest

__all__ = ["driver"]


def test_ranks_are_read_from_the_agents_environment() -> None:
    environ = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert RankEnv.from_environ(environ) == RankEnv(rank=3, local_rank=1, world_size=4, restart=2)
    with pytest.raises(RunError, match="WORLD_SIZE"):
        RankEnv.from_environ({"RANK": "0", "LOCAL_RANK": "0"})


def test_no_garbage_is_searched_for_at_the_end_of_a_process() -> None:
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 1000)); import launcher.worker"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "True\n"


def test_a_process_dies_with_its_parent() -> None:
    child = (
        "import os, time; from launcher.child_process import die_with_parent;"
        "die_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait(timeout=10)
    process.stdout.close()
    deadline = time.monotonic() + 10
    while _alive(pid):
        assert time.monotonic() < deadline, f"process {pid} outlived its parent"
        time.sleep(0.02)


def test_a_rank_of_a_score_pass_dies_with_its_parent(tmp_path: Path) -> None:
    task = tmp_path / "task.json"
    os.mkfifo(task)
    parent = (
        "import subprocess, sys; command = [sys.executable, '-m', 'launcher.evaluate.document_losses', sys.argv[1]];"
        "rank = subprocess.Popen(command);"
        "print(rank.pid, flush=True); rank.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, str(task)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        pid = int(process.stdout.readline())
    deadline, writer = time.monotonic() + 120, None
    while writer is None:
        # The rank is up once it opens the pipe of its task.
        assert time.monotonic() < deadline
        assert _alive(pid)
        with suppress(OSError):
            writer = os.open(task, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.02)
    try:
        process.kill()
        process.wait(timeout=10)
        while _alive(pid):
            assert time.monotonic() < deadline, f"process {pid} outlived its parent"
            time.sleep(0.02)
    finally:
        os.close(writer)


def test_a_local_run_ends_only_when_the_mirror_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time after the last step that the run spends waiting costs as much as training, even if the wait is cut short."""
    plan = hand_made.plan(tmp_path / "runs/demo", hand_made.SETTINGS, price=Price(usd_per_gpu_hour=2.0))
    run = hand_made.run(plan, Attempt(None))
    seen: list[float] = []

    class Mirror:
        def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
            assert hand_made.end_of(run)["message"] == "the ranks ended without an outcome"
            spent = goodput.read(run, time.time() + 3600, run_store.read_status(run).state)
            seen.append(spent.gpu_s)

    monkeypatch.setattr(supervise.Stopper, "install", lambda self: self)
    monkeypatch.setattr(supervise.sidecar, "start_mirror", lambda *arguments: Mirror())
    monkeypatch.setattr(local.detached_process, "start_liveness_file", lambda run: None)
    monkeypatch.setattr(supervise, "connect_to_head", lambda *_: None)
    monkeypatch.setattr(supervise.NodeAgent, "run_ranks", lambda *arguments: None)
    monkeypatch.setattr(local, "close_wandb_run", lambda *arguments: None)
    assert local.main(str(run.plan), 1) == 1
    # Only GPUs are checked.
    assert [event["text"] for event in read_events(run.events)] == ["the attempt failed: the ranks ended without an outcome"]
    assert seen == [pytest.approx(2 * 3600, abs=60)]
    assert hand_made.end_of(run)["ended_at"] == pytest.approx(time.time(), abs=60)
    assert run_store.read_status(run).state == "failed"


def test_a_local_run_on_gpus_checks_them_beside_the_imports_and_gives_ranks_the_allocator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Callable[..., None]
) -> None:
    """It refuses nothing: the alerts tell why such a run is slow, or about to fail."""
    driver({**H100, "processes": [(1, 70000)]}, {**OTHER, "slowdowns": 0x80})
    monkeypatch.setattr(gpus, "GRACE_S", 0.0)
    monkeypatch.setattr(machine, "_SHARED_MEMORY_OF_GPUS_BYTES", 1 << 60)
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        # Removed again at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    topology = Topology(nodes=1, ranks_per_node=2, world_size=2, device="cuda", backend="nccl")
    run = hand_made.run(hand_made.plan(tmp_path / "runs/demo", hand_made.SETTINGS, topology=topology), Attempt(None))
    of_server: dict[str, str] = {}
    of_ranks: dict[str, str] = {}

    def run_ranks(*arguments: object) -> None:
        of_ranks.update(os.environ)
        for thread in [thread for thread in threading.enumerate() if thread.name == "gpu-check"]:
            thread.join(60)

    monkeypatch.setattr(supervise.Stopper, "install", lambda self: self)
    monkeypatch.setattr(supervise.RankProcesses, "warm_up", lambda self, plan, environment: of_server.update(environment))
    monkeypatch.setattr(local.detached_process, "start_liveness_file", lambda run: None)
    monkeypatch.setattr(supervise, "connect_to_head", lambda *_: None)
    monkeypatch.setattr(supervise.NodeAgent, "run_ranks", run_ranks)
    monkeypatch.setattr(local, "close_wandb_run", lambda *arguments: None)
    assert local.main(str(run.plan), 1) == 1
    assert of_server["PYTORCH_ALLOC_CONF"] == of_ranks["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    texts = [text.partition(": ")[2] for text in event_texts(run)]
    expected = ("too little shared memory", "clocks of a GPU are lowered", "process outside")
    assert len(texts) == 4
    for part, text in zip(expected, texts, strict=False):
        assert part in text
    assert "process 1 (" in texts[2]


@pytest.mark.parametrize("save, number", [(True, CANCEL), (False, signal.SIGKILL)])
def test_a_cancel_request_in_the_run_directory_reaches_the_ranks(tmp_path: Path, save: bool, number: signal.Signals) -> None:
    plan = hand_made.plan(tmp_path / "runs/demo", hand_made.SETTINGS)
    run, sent, is_sent = hand_made.run(plan, Attempt(None)), list[int](), threading.Event()

    def send(received: int) -> None:
        sent.append(received)
        if received == number:
            is_sent.set()

    stopper = supervise.Stopper(60.0, {}, send)
    agent = supervise.NodeAgent(plan, str(run.plan), run, 1, stopper, supervise.RankProcesses(tmp_path), 0.0)
    run_store.update_status(run, state="running", attempt=1, job=detached_process.describe_this_process())
    LocalCluster().cancel(run, save=save)
    agent.watch_requests()
    assert is_sent.wait(20)
    stopper.disarm()
    assert save is (signal.SIGKILL not in sent)


def test_answers_that_do_not_start_leave_no_mirror_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = hand_made.run(hand_made.plan(tmp_path / "runs/demo", hand_made.SETTINGS), Attempt(None))
    finished: list[float] = []

    class Mirror:
        def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
            finished.append(until)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(supervise.Stopper, "install", lambda self: self)
    monkeypatch.setattr(supervise, "connect_to_head", lambda *_: None)
    monkeypatch.setattr(supervise.sidecar, "start_mirror", lambda *_: Mirror())
    monkeypatch.setattr(supervise.sidecar, "start_answers", refuse)
    agent = supervise.NodeAgent.start(str(run.plan), 1, {})
    assert agent is not None
    node = agent.supervise(Attempt(None, nodes=("n1",), address="127.0.0.1", interface="lo", port=1), 0, tmp_path / "agent.log")
    assert node.first_failure is not None
    assert len(finished) == 1


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
