"""A restart of the ranks by their agents: one node tells it, with the reason."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from torch.distributed import HashStore

from launcher.worker.rank import NodePlace
from launcher.worker.record import of_restart
from launcher.worker.rendezvous import NodeRendezvous


def test_the_node_whose_ranks_failed_tells_it() -> None:
    store, hosts, told = HashStore(), ("n0", "n1"), list[str]()

    def node(number: int) -> NodeRendezvous:
        place = NodePlace(number, hosts, "127.0.0.1", None)
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


def test_the_reason_is_that_of_the_last_start(tmp_path: Path) -> None:
    assert of_restart(tmp_path, []).startswith("a rank was killed")

    def failed(start: int, local_rank: int, message: str) -> None:
        folder = tmp_path / f"run_x/attempt_{start}/{local_rank}"
        folder.mkdir(parents=True)
        (folder / "error.json").write_text(json.dumps({"message": {"message": message}}))

    failed(9, 0, "OSError: long ago")
    failed(10, 1, "RuntimeError: CUDA error: an illegal memory access\nmore of it")
    assert of_restart(tmp_path, []) == "local rank 1: RuntimeError: CUDA error: an illegal memory access"
    assert of_restart(tmp_path, ["rank 5 is stopped; killed it"]) == "rank 5 is stopped; killed it"
    (tmp_path / "run_x/attempt_11").mkdir()
    assert of_restart(tmp_path, []).startswith("a rank was killed")
