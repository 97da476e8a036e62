"""The rendezvous of the node agents, at the start and before each restart: all nodes, in fixed order.

torch's own handler is made for nodes that come and go: it polls once a second for missing nodes, and numbers nodes by address.
A job's nodes are known, so here each node waits for the others' keys in the head node's store, and node 0 has rank 0. The
rendezvous closes on a failure that a restart would repeat: one that a rank recorded as such, or one that came back after
restarts.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from launcher.clusters import network
from launcher.worker.ranks.rank_env import NodeInfo


class NodeRendezvous(RendezvousHandler):
    """`store` is on the head node. `is_final` returns whether ranks failed in a way that a restart would repeat.

    `own_failure` returns why this node's ranks failed, or an empty string if none did. When all nodes have arrived for a restart,
    `on_restart` is called on the head node with the restart's number, counted from 1, and the result of each node's
    `own_failure`. It returns why the ranks are not restarted, or an empty string if they are.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        node: NodeInfo,
        deadline_s: float,
        is_final: Callable[[], bool],
        own_failure: Callable[[], str],
        on_restart: Callable[[int, list[str]], str],
    ) -> None:
        self._store = PrefixStore(f"rendezvous/{run_id}", store)
        self._run_id, self._node = run_id, node
        self._deadline = timedelta(seconds=deadline_s)
        self._is_final, self._own_failure, self._on_restart = is_final, own_failure, on_restart
        self._round = 0

    @property
    def num_restarts(self) -> int:
        """The number of restarts. It is the same on all nodes, because no node starts ranks before all have arrived."""
        return max(0, self._round - 1)

    def get_backend(self) -> str:
        return "nodes"

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all nodes have arrived for the next round; every node takes part in every round.

        Raises:
            RendezvousClosedError: if a restart would repeat the failure.
            RendezvousTimeoutError: with the nodes that did not arrive.
        """
        if self._round and self._is_final():
            raise RendezvousClosedError("the ranks failed in a way that a restart would repeat")
        self._round += 1
        keys = [f"{self._round}/{node}" for node in range(len(self._node.hosts))]
        self._store.set(keys[self._node.node], self._own_failure() if self._round > 1 else "")
        self._store.add(self._waiting(self._round), 1)
        try:
            self._store.wait(keys, self._deadline)
        except DistStoreError:
            missing = [host for host, key in zip(self._node.hosts, keys, strict=True) if not self._store.check([key])]
            raise RendezvousTimeoutError(
                f"{', '.join(missing)} did not reach the rendezvous within {self._deadline.total_seconds():.0f} s"
            ) from None
        if self._round > 1 and (reason := self._decide(keys)):
            raise RendezvousClosedError(reason)
        store = PrefixStore(f"ranks/{self._round}", self._store)
        port = network.free_port(self._node.address) if self._node.is_head else None
        info = RendezvousStoreInfo.build(self._node.node, store, self._node.address, port)
        return RendezvousInfo(store, self._node.node, len(self._node.hosts), info)

    def _decide(self, keys: list[str]) -> str:
        """Return why the ranks are not restarted. The head node decides for all: other nodes may see the disk with a delay."""
        decision = f"decision/{self._round}"
        if self._node.is_head:
            self._store.set(decision, self._on_restart(self.num_restarts, [self._store.get(key).decode() for key in keys]))
        self._store.wait([decision], self._deadline)
        return self._store.get(decision).decode()

    def num_nodes_waiting(self) -> int:
        """Return the number of nodes that wait for the next round because their ranks failed."""
        return self._store.add(self._waiting(self._round + 1), 0)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: an agent reports its end through its exit code."""

    def shutdown(self) -> bool:
        return True

    @staticmethod
    def _waiting(number: int) -> str:
        return f"waiting/{number}"
