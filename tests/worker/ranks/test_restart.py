"""A restart of the ranks by their agents: one node reports it, with the reason."""

from __future__ import annotations

import threading
from pathlib import Path

from torch.distributed import HashStore

from launcher.error_record import ErrorRecord
from launcher.plan.run_dir import RunDir
from launcher.worker.failure_record import RankExit, describe_restart
from launcher.worker.ranks.rank_env import NodeInfo
from launcher.worker.rendezvous import NodeRendezvous


def test_the_node_whose_ranks_failed_reports_the_restart() -> None:
    store, hosts, told = HashStore(), ("n0", "n1"), list[str]()

    def node(number: int) -> NodeRendezvous:
        place = NodeInfo(number, hosts, "127.0.0.1", None)
        return NodeRendezvous(store, "run", place, 20, lambda: False, lambda count: told.append(f"{hosts[number]} {count}"))

    def meet(first: NodeRendezvous, then: NodeRendezvous) -> None:
        came = threading.Thread(target=first.next_rendezvous)
        came.start()
        while not then.num_nodes_waiting():
            assert came.is_alive()
        then.next_rendezvous()
        came.join(20)

    zero, one = node(0), node(1)
    meet(zero, one)
    assert told == [], "the first start is no restart"
    meet(one, zero)
    meet(zero, one)
    assert told == ["n1 1", "n0 2"]


def test_a_restart_is_explained_by_the_watchdog_or_by_the_first_failure(tmp_path: Path) -> None:
    exits = [
        RankExit(0, 1, 9.0, ErrorRecord("RuntimeError: Connection closed by peer")),
        RankExit(1, 1, 8.0, ErrorRecord("RuntimeError: CUDA error: an illegal memory access\nmore of it")),
    ]
    run = RunDir(tmp_path)
    assert describe_restart(exits, run, 1, []) == "rank 1: RuntimeError: CUDA error: an illegal memory access"
    assert describe_restart(exits, run, 1, ["rank 5 is stopped; killed it"]) == "rank 5 is stopped; killed it"
