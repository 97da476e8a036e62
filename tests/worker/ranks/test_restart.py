"""When the agents restart the ranks, the head node reports it with the failure that caused the others."""

from __future__ import annotations

import errno
import json
import subprocess
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from launcher import json_records, run_store
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, FailureRecord
from launcher.tracking.jsonl import read_events
from launcher.worker.agent import _FailureLog
from launcher.worker.failure_record import ErrorMemory, ErrorRecord, RankExit
from launcher.worker.ranks import elastic
from launcher.worker.ranks.elastic import NodeRendezvous
from launcher.worker.ranks.rank_env import NodeInfo

HOSTS = ("n0", "n1")
PEER_LOST = RankExit(0, 1, 8.0, ErrorRecord("RuntimeError: [pair.cc:553] Connection closed by peer\nmore of it"))


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
