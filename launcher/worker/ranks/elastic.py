"""A node's torch elastic agent: it starts the ranks, and restarts them after one has failed.

Before each start all nodes meet, in fixed order. torch's own rendezvous is made for nodes that come and go: it polls every second
for missing nodes, and numbers nodes by address. A job's nodes are known, so here each node waits for the others' keys in the head
node's store, and node 0 has rank 0. The rendezvous closes on a failure that a restart would repeat: one that a rank recorded as
such, or one that came back after restarts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent, Worker
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from launcher import clock
from launcher.clusters import network
from launcher.worker.failure_record import ErrorMemory, RankExit
from launcher.worker.ranks.rank_env import NodeInfo
from launcher.worker.ranks.rank_process import RankProcess, StartRank
from launcher.worker.signals import DISMISSED

_POLL_S = 0.05
# How often a node that waits for the others looks whether they cannot arrive any more.
_LOOK = timedelta(seconds=1)
# Seconds from TERM to KILL when ranks are stopped.
_STOP_S = 30
# Exit codes of ranks that the agent stopped.
_STOPPED_BY_AGENT = (-signal.SIGTERM, -signal.SIGKILL, DISMISSED)


def run_ranks(
    start: StartRank,
    rendezvous: NodeRendezvous,
    *,
    num_ranks: int,
    max_restarts: int,
    address: str,
    on_failure: Callable[[list[RankExit]], None],
    errors: ErrorMemory,
) -> bool:
    """Run `num_ranks` processes to their end; returns whether all succeeded. `start` receives a rank's environment variables.

    At each failure, `on_failure` receives the exits of this node's failed ranks; it is called again with the exits that are found
    while the ranks are stopped. `errors` holds the ranks' error records.

    Raises:
        RendezvousClosedError: if a restart would repeat the failure.
        Exception: if the agent itself fails.
    """
    spec = WorkerSpec(
        role="default_role",
        local_world_size=num_ranks,
        rdzv_handler=rendezvous,
        entrypoint="launcher.worker.ranks.rank_main",
        max_restarts=max_restarts,
        monitor_interval=_POLL_S,
        local_addr=address,
    )
    return not _Agent(spec, rendezvous, start, on_failure, errors).run().is_failed()


class _Agent(SimpleElasticAgent):
    """Starts ranks with `start`, and reports every failure; torch's own agent reports only the last one.

    torch's own agent also parses each failed rank's record, without catching errors, before it decides on a restart: an empty
    record would end a run that has restarts left.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        rendezvous: NodeRendezvous,
        start: StartRank,
        on_failure: Callable[[list[RankExit]], None],
        errors: ErrorMemory,
    ) -> None:
        super().__init__(spec)
        self._rendezvous_handler = rendezvous
        self._start, self._on_failure, self._errors = start, on_failure, errors
        self._processes: dict[int, RankProcess] = {}
        # Exits of the ranks that have failed since the last start.
        self._exits: dict[int, RankExit] = {}

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        # On each node, torch counts only the failures of that node's ranks. A node with a lower count would wait for one that
        # gave up.
        spec = worker_group.spec
        self._remaining_restarts = spec.max_restarts - self._rendezvous_handler.num_restarts
        self._processes, self._exits = {}, {}
        for worker in worker_group.workers:
            # Those of torchrun's variables that torch and libraries read.
            environment = {
                **os.environ,
                "RANK": str(worker.global_rank),
                "LOCAL_RANK": str(worker.local_rank),
                "WORLD_SIZE": str(worker.world_size),
                "LOCAL_WORLD_SIZE": str(spec.local_world_size),
                "MASTER_ADDR": str(worker_group.master_addr),
                "MASTER_PORT": str(worker_group.master_port),
                "TORCHELASTIC_RESTART_COUNT": str(self._rendezvous_handler.num_restarts),
                "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
                "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
                "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            }
            self._processes[worker.local_rank] = self._start(environment)
        return {local_rank: process.pid for local_rank, process in self._processes.items()}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = {worker: self._processes[worker.local_rank].poll() for worker in worker_group.workers}
        failed = {worker: code for worker, code in codes.items() if code}
        if failed:
            now = clock.now()
            self._exits = {worker.global_rank: self._describe_exit(worker, code, now) for worker, code in failed.items()}
            self._on_failure([*self._exits.values()])
            return RunResult(WorkerState.FAILED)
        if all(code == 0 for code in codes.values()):
            return RunResult(WorkerState.SUCCEEDED, return_values={worker.global_rank: None for worker in codes})
        return RunResult(WorkerState.HEALTHY)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()
        # Report the ranks that failed by themselves but ended later than the ranks that noticed: a rank that dumps core or frees
        # a lot of memory ends after its peers have lost their connections.
        now, late = clock.now(), {}
        for worker in worker_group.workers:
            code = self._processes[worker.local_rank].returncode if worker.local_rank in self._processes else None
            if code and code not in _STOPPED_BY_AGENT and worker.global_rank not in self._exits:
                late[worker.global_rank] = self._describe_exit(worker, code, now)
        if late:
            self._exits |= late
            self._on_failure([*self._exits.values()])

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = _STOP_S) -> None:
        for process in self._processes.values():
            process.send_signal(death_sig)
        until = time.monotonic() + timeout
        for process in self._processes.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for process in self._processes.values():
            process.wait()

    def _describe_exit(self, worker: Worker, code: int, now: float) -> RankExit:
        error = self._errors.read(worker.local_rank, self._processes[worker.local_rank].pid)
        return RankExit(worker.global_rank, code, now if error is None or error.at is None else error.at, error)


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
        """Wait until all nodes have arrived for the next round; every node takes part in every round."""
        if self._round and self._is_final():
            raise RendezvousClosedError("the ranks failed in a way that a restart would repeat")
        self._round += 1
        keys = [f"{self._round}/{node}" for node in range(len(self._node.hosts))]
        self._store.set(keys[self._node.node], self._own_failure() if self._round > 1 else "")
        self._store.add(self._waiting_key(self._round), 1)
        until = time.monotonic() + self._deadline.total_seconds()
        while True:
            try:
                self._store.wait(keys, _LOOK)
                break
            except DistStoreError:
                if self._is_final():
                    raise RendezvousClosedError("a node that is waited for cannot arrive") from None
                if time.monotonic() > until:
                    missing = [host for host, key in zip(self._node.hosts, keys, strict=True) if not self._store.check([key])]
                    raise RendezvousTimeoutError(
                        f"{', '.join(missing)} did not reach the rendezvous within {self._deadline.total_seconds():.0f} s"
                    ) from None
        if self._round > 1:
            # The head node decides for all whether the ranks are restarted: other nodes may see the disk with a delay.
            decision = f"decision/{self._round}"
            if self._node.is_head:
                self._store.set(decision, self._on_restart(self.num_restarts, [self._store.get(key).decode() for key in keys]))
            self._store.wait([decision], self._deadline)
            if reason := self._store.get(decision).decode():
                raise RendezvousClosedError(reason)
        store = PrefixStore(f"ranks/{self._round}", self._store)
        port = network.free_port(self._node.address) if self._node.is_head else None
        info = RendezvousStoreInfo.build(self._node.node, store, self._node.address, port)
        return RendezvousInfo(store, self._node.node, len(self._node.hosts), info)

    def num_nodes_waiting(self) -> int:
        """Return the number of nodes that wait for the next round because their ranks failed."""
        return self._store.add(self._waiting_key(self._round + 1), 0)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: an agent reports its end through its exit code."""

    def shutdown(self) -> bool:
        return True

    @staticmethod
    def _waiting_key(number: int) -> str:
        return f"waiting/{number}"
