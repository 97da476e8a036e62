"""How the node agents meet, at the start and before each restart: all of them, in the order of the nodes.

torch's own handler is made for nodes that come and go: it looks once a second whether all are there, and numbers nodes by
their addresses. A job's nodes are known, so here each waits for the others' keys in the head's store, node 0 has rank 0,
and a failure that would repeat itself ends the meeting instead of a restart.
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

from launcher.worker.rank_env import NodePlace


class NodeRendezvous(RendezvousHandler):
    """`store` lives on the head node. `is_final` tells whether ranks failed in a way that would repeat itself.

    `on_restart` is called with the number of the restart, counted from 1, on the one node that came first: its ranks failed.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        place: NodePlace,
        deadline_s: float,
        is_final: Callable[[], bool],
        on_restart: Callable[[int], None],
    ) -> None:
        self._store = PrefixStore(f"rendezvous/{run_id}", store)
        self._run_id, self._place = run_id, place
        self._deadline = timedelta(seconds=deadline_s)
        self._is_final, self._on_restart = is_final, on_restart
        self._round = 0

    def get_backend(self) -> str:
        return "nodes"

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all nodes have come for the next round; each takes part in every round.

        Raises:
            RendezvousClosedError: where ranks need not be started again.
            RendezvousTimeoutError: with the nodes that did not come.
        """
        if self._round and self._is_final():
            raise RendezvousClosedError("the ranks failed in a way that would repeat itself")
        self._round += 1
        keys = [f"{self._round}/{node}" for node in range(len(self._place.hosts))]
        self._store.set(keys[self._place.node], "")
        if self._store.add(self._waiting(self._round), 1) == 1 and self._round > 1:
            self._on_restart(self._round - 1)
        try:
            self._store.wait(keys, self._deadline)
        except DistStoreError:
            missing = [host for host, key in zip(self._place.hosts, keys, strict=True) if not self._store.check([key])]
            raise RendezvousTimeoutError(f"no sign of {', '.join(missing)} for {self._deadline.total_seconds():.0f} s") from None
        store = PrefixStore(f"ranks/{self._round}", self._store)
        info = RendezvousStoreInfo.build(self._place.node, store, self._place.address)
        return RendezvousInfo(store, self._place.node, len(self._place.hosts), info)

    def num_nodes_waiting(self) -> int:
        """Nodes that have come for the round after this one, because their ranks failed."""
        return self._store.add(self._waiting(self._round + 1), 0)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """An agent that ends says so with its exit code; nobody asks here."""

    def shutdown(self) -> bool:
        return True

    @staticmethod
    def _waiting(number: int) -> str:
        return f"waiting/{number}"
