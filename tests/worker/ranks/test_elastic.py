"""The agents of a run's nodes restart failed ranks and name the rank that failed; the ranks train nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hand_made
import pytest
from forked import require_exit
from hand_made import event_texts
from pace import slowness
from plan_fixtures import ConfigOf, facts_for
from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from launcher.clusters.network import free_port
from launcher.plan.planner import plan
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.runs.journal import FailureRecord
from launcher.runs.run_records import Attempt
from launcher.tracking.jsonl import read_events
from launcher.worker.failure_record import ErrorMemory, ErrorRecord, RankExit
from launcher.worker.ranks import elastic
from launcher.worker.ranks.elastic import NodeRendezvous
from launcher.worker.ranks.rank_env import NodeInfo
from launcher.worker.supervise import _FailureLog

REPO = Path(__file__).resolve().parents[3]
# Each start of the ranks ends differently. A lock tells rank 1 that rank 0 has died, as a lost connection would.
HOOK = """
import contextlib, fcntl, importlib, json, os, signal, sys, time, types

def train(plan, rank_info, stop, beat, on_early_stop, on_exported):
    if "STEPS" in os.environ:
        step = json.loads(os.environ["STEPS"])[rank_info.restart]
        beat("loaded", 40)
        if rank_info.rank == 0:
            time.sleep(60)
        if step is None:
            os.kill(os.getpid(), signal.SIGKILL)
        beat("training", step)
        raise IndexError("as it says")
    if rank_info.restart == 0:
        lock = open(os.environ["LOCK"], "a")
        if rank_info.rank == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
            while not os.path.getsize(lock.name):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while True:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(0.01)
        except BlockingIOError:
            print("ready", file=lock, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        raise RuntimeError("Connection closed by peer")
    if rank_info.restart == 1:
        if rank_info.rank == 0:
            time.sleep(60)
        os._exit(7)
    json.dump(dict(os.environ), open(f"{os.environ['LOCK']}.{rank_info.rank}", "w"))
    return types.SimpleNamespace(state="completed", reason="completed", step=1, message="trained", checkpoint="")

if {"launcher.worker.ranks.rank_main", "launcher.worker.ranks.fork_server"} & {*sys.orig_argv}:
    preload = types.ModuleType("launcher.train.preload")
    # Importing torch once is enough if ranks are forked.
    preload.import_stack = lambda plan, tracks: importlib.import_module("torch")
    distributed, loop = types.ModuleType("launcher.distributed"), types.ModuleType("launcher.train.loop")
    distributed.RankInfo = lambda rank, local_rank, size, attempt, restart: types.SimpleNamespace(
        rank=rank, restart=restart, is_main=rank == 0
    )
    loop.train = train
    answers = types.ModuleType("launcher.evaluate.answers")
    answers.report_answers = None
    largest_batch = types.ModuleType("launcher.train.monitoring.largest_batch")
    largest_batch.explained_out_of_memory = lambda plan, run_dir, has_completed_step: contextlib.nullcontext()
    names = ("distributed", "train.loop", "train.preload", "evaluate.answers", "train.monitoring.largest_batch")
    modules = (distributed, loop, preload, answers, largest_batch)
    sys.modules.update(zip((f"launcher.{name}" for name in names), modules, strict=True))
"""
HOSTS = ("n0", "n1")
PEER_LOST = RankExit(0, 1, 8.0, ErrorRecord("RuntimeError: [pair.cc:553] Connection closed by peer\nmore of it"))
# The limit is 4 s; rank 0 reads for three times as long.
READS_S = 12


@pytest.fixture
def run(config_of: ConfigOf, tmp_path: Path) -> RunDir:
    """A run on two local ranks whose attempt 1 is about to start."""
    cluster = ("cluster.max_restarts=4", "cluster.ranks_per_node=2")
    config = config_of("tracking=none", "run.name=tried", *cluster)
    return hand_made.run(plan(config, facts_for(config, working_dir=str(tmp_path))), Attempt(None))


def run_agent(run: RunDir, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "hook").mkdir()
    (folder / "hook/sitecustomize.py").write_text(HOOK)
    environment = os.environ | {"PYTHONPATH": f"{folder / 'hook'}:{REPO}", **variables}
    command = [sys.executable, "-m", "launcher.worker.local", str(run.plan), "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100 * slowness())


@pytest.mark.rest
def test_killed_ranks_and_ranks_without_a_record_each_cost_one_restart(run: RunDir, tmp_path: Path) -> None:
    done = run_agent(run, tmp_path, LOCK=str(tmp_path / "lock"))
    require_exit(done)
    assert hand_made.end_of(run)["state"] == "completed"
    for rank in (0, 1):
        # What the agent sets for the C library's allocator reaches the ranks, as PyTorch's does on GPUs.
        variables = json_records.read_json(tmp_path / f"lock.{rank}")
        assert variables["LOCAL_RANK"] == str(rank)
        assert {"MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS"} <= variables.keys()
    restarts = [text.partition(": ")[2] for text in event_texts(run)]
    assert restarts == ["rank 0: killed by SIGKILL", "rank 1: ended with exit code 7 and left no record of an error"]


@pytest.mark.rest
def test_an_exception_that_comes_back_at_one_step_after_two_restarts_ends_the_run(run: RunDir, tmp_path: Path) -> None:
    """One more restart is left. The killed rank in between is not evidence about the exception."""
    done = run_agent(run, tmp_path, STEPS="[43, null, 43, 43, 43]")
    require_exit(done, 1)
    exit_record = hand_made.end_of(run)
    reason = "IndexError in step 44 occurred 3 times, twice after a resume from the initial weights: it repeats"
    assert (exit_record["state"], exit_record["message"]) == ("failed", f"rank 1: IndexError: as it says; {reason}")
    assert exit_record["first_failure"]["step"] == 43
    failures = ["rank 1: IndexError: as it says", "rank 1: killed by SIGKILL", "rank 1: IndexError: as it says"]
    restarts = [f"all ranks are restarted (restart {count}): {failure}" for count, failure in enumerate(failures, 1)]
    assert event_texts(run) == [*restarts, f"the attempt failed: {exit_record['message']}"]


def meet(first: NodeRendezvous, then: NodeRendezvous) -> None:
    came = threading.Thread(target=first.next_rendezvous)
    came.start()
    while not then.num_nodes_waiting():
        assert came.is_alive()
    then.next_rendezvous()
    came.join(20)


def two_nodes(folder: Path) -> tuple[RunDir, list[_FailureLog], list[NodeRendezvous]]:
    run, store = RunDir(folder), HashStore()
    run.attempts.mkdir()
    run_store.create_attempt(run, Attempt(None))
    nodes = [NodeInfo(number, HOSTS, "127.0.0.1", None) for number in (0, 1)]
    logs = [_FailureLog(run, 1, node, folder / "log", str) for node in nodes]
    meetings = [
        NodeRendezvous(store, "run", node, 20, log.is_final, log.describe_own, log.report_restart)
        for node, log in zip(nodes, logs, strict=True)
    ]
    return run, logs, meetings


def test_all_nodes_count_the_same_restarts_and_give_up_together(tmp_path: Path) -> None:
    """First the rank of one node fails while the other waits; then both fail, and neither node has a restart left."""
    _, _, meetings = two_nodes(tmp_path)
    counts: dict[int, list[str]] = {0: [], 1: []}

    def run_node(node: int) -> bool:
        def start(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
            counts[node].append(environment["TORCHELASTIC_RESTART_COUNT"])
            command = "exec sleep 60" if node == 1 and len(counts[node]) == 1 else "exit 7"
            return subprocess.Popen(["sh", "-c", command])

        return elastic.run_ranks(
            start,
            meetings[node],
            num_ranks=1,
            max_restarts=1,
            address="127.0.0.1",
            on_failure=lambda exits: None,
            errors=ErrorMemory(1),
        )

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(run_node, node) for node in (0, 1)]
        assert [node.result(60) for node in done] == [False, False], "neither waits for the other at another rendezvous"
    assert counts == {0: ["0", "1"], 1: ["0", "1"]}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "culprit, expected",
    [
        (RankExit(1, -11, 9.0, None), "rank 1 on n1: killed by SIGSEGV (a segmentation fault; its log ends with the stacks)"),
        (RankExit(1, -9, 9.0, None), "rank 1 on n1: killed by SIGKILL"),
        (RankExit(1, 1, 9.0, ErrorRecord("RuntimeError: CUDA error\nmore")), "rank 1 on n1: RuntimeError: CUDA error"),
    ],
)
def test_a_restart_names_the_failure_that_caused_the_others_whichever_node_arrives_first(
    tmp_path: Path, first: int, culprit: RankExit, expected: str
) -> None:
    run, logs, (zero, one) = two_nodes(tmp_path)
    meet(zero, one)
    assert not run.events.exists(), "the first start is no restart"
    logs[0].set_exits([PEER_LOST])
    logs[1].set_exits([culprit])
    meet(*((zero, one) if first == 0 else (one, zero)))
    (event,) = read_events(run.events)
    assert event["text"] == f"all ranks are restarted (restart 1): {expected}"


def test_an_exception_that_repeats_closes_the_rendezvous_of_all_nodes(tmp_path: Path) -> None:
    """A node whose ranks only lost their peers, or that has no failure, does not decide by itself."""
    run, logs, (zero, one) = two_nodes(tmp_path)
    meet(zero, one)
    raised = RankExit(1, 1, 9.0, ErrorRecord("IndexError: as it says", step=43))
    for exits in ([PEER_LOST], []):
        logs[0].set_exits(exits)
        logs[1].set_exits([raised])
        meet(zero, one)
    logs[1].set_exits([raised])
    with ThreadPoolExecutor(2) as pool:
        errors = [future.exception(20) for future in [pool.submit(node.next_rendezvous) for node in (zero, one)]]
    reason = "IndexError in step 44 occurred 3 times, twice after a resume from the initial weights: it repeats"
    assert [(type(error), str(error)) for error in errors] == [(RendezvousClosedError, reason)] * 2
    assert logs[0].from_exception(errors[0]) is None
    own = logs[1].from_exception(errors[1])
    assert own is not None
    assert own.line == "rank 1 on n1: IndexError: as it says"
    assert len(read_events(run.events)) == 2, "the end of the attempt has an alert of its own"


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_watchdogs_message_explains_a_rank_that_it_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = _FailureLog(RunDir(tmp_path), 1, NodeInfo(0, ("n0",), "127.0.0.1", None), tmp_path / "log", str)
    monkeypatch.setattr("builtins.print", full_disk)
    log.add_stall("rank 5 (pid 7) is stopped by a signal: no progress for 9 s in step 3; killed it")
    log.set_exits([RankExit(5, -9, 9.0, None)])
    record = json.loads(log.describe_own())
    assert record["message"] == "(pid 7) is stopped by a signal: no progress for 9 s in step 3; killed it"
    assert json_records.decode(FailureRecord, record, "").source == "rank 5"
    assert log.describe_own() == "", "later failures have other reasons"


AGENT = """
import faulthandler, sys, time
from pathlib import Path
faulthandler.dump_traceback_later(100)
from launcher.distributed import open_store
from launcher.worker import supervise
from launcher.worker.ranks import watchdog
from launcher.worker.ranks.rank_env import NodeInfo

plan_path, node, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
watchdog._MIN_LOAD_S = 4.0
here = supervise.NodeAgent.start(plan_path, 1, {})
store = open_store("127.0.0.1", port, is_server=node == 0)
failure = here.run_ranks(NodeInfo(node, ("n0", "n1"), "127.0.0.1", None), store, Path(plan_path).with_name("agent.log"))
store.add("ended", 1)
here.ranks.close()
while node == 0 and store.add("ended", 0) < 2:
    time.sleep(0.05)
sys.exit(failure is not None)
"""
# In the first start, rank 0 reads and then hangs, as does the other rank, which waits for it.
LOADING_HOOK = """
import contextlib, os, sys, time, types

def train(plan, rank_info, stop, beat, on_early_stop, on_exported):
    beat("joined", 0)
    weights, until = os.environ["WEIGHTS"], time.monotonic() + float(os.environ["READS_S"])
    # A node whose own rank did not fail does not count the restart.
    started = f"{weights}.{rank_info.rank}"
    if not os.path.exists(started):
        open(started, "w").close()
        while rank_info.rank == 0 and time.monotonic() < until:
            with open(weights, "rb") as file:
                file.read()
            time.sleep(0.1)
        if rank_info.rank == 0:
            print("hangs at", time.time(), file=open(weights + ".hangs", "w"), flush=True)
        time.sleep(200)
    return types.SimpleNamespace(state="completed", reason="completed", step=1, message="trained", checkpoint="")

if {"launcher.worker.ranks.rank_main", "launcher.worker.ranks.fork_server"} & {*sys.orig_argv}:
    names = ("distributed", "train.loop", "train.preload", "evaluate.answers", "train.monitoring.largest_batch")
    distributed, loop, preload, answers, largest_batch = modules = [types.ModuleType(name) for name in names]
    preload.import_stack = lambda plan, tracks: None
    distributed.RankInfo = lambda rank, local_rank, size, attempt, restart: types.SimpleNamespace(
        rank=rank, restart=restart, is_main=rank == 0
    )
    loop.train, answers.report_answers = train, None
    largest_batch.explained_out_of_memory = lambda *_: contextlib.nullcontext()
    sys.modules.update(zip((f"launcher.{name}" for name in names), modules, strict=True))
"""


@pytest.mark.rest
def test_a_rank_waits_for_one_of_another_node_as_long_as_that_reads(config_of: ConfigOf, tmp_path: Path) -> None:
    cluster = ("cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.max_restarts=1")
    config = config_of("tracking=none", "run.name=tried", "cluster.stall_seconds=2", *cluster)
    run = hand_made.run(plan(config, facts_for(config, working_dir=str(tmp_path))), Attempt(None))
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(LOADING_HOOK)
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(4 << 20))
    variables = {"PYTHONPATH": f"{tmp_path / 'hook'}:{REPO}", "WEIGHTS": str(weights), "READS_S": str(READS_S)}
    port = free_port("127.0.0.1")
    command = [sys.executable, "-c", AGENT, str(run.plan)]
    logs = [tmp_path / f"agent-{node}.log" for node in (0, 1)]
    agents = [
        subprocess.Popen(
            [*command, str(node), str(port)], env=os.environ | variables, stdout=log.open("w"), stderr=subprocess.STDOUT
        )
        for node, log in enumerate(logs)
    ]
    try:
        ends = [agent.wait(150) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
        print(*(log.read_text() for log in logs))
    assert ends == [0, 0]
    (restart,) = [event for event in read_events(run.events) if event["kind"] == "alert"]
    assert "all ranks are restarted (restart 1): rank " in restart["text"]
    assert "reads nothing, and neither does any other rank: no progress for " in restart["text"]
    # While rank 0 read, the waiting rank exceeded the limit without being killed.
    hung_at = float(Path(f"{weights}.hangs").read_text().split()[-1])
    assert restart["time"] > hung_at
