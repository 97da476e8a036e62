"""torch's elastic agent as a node runs it: it starts the ranks, and starts them again after one of them has failed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest
from torch.distributed.elastic.rendezvous import RendezvousHandler

from launcher.error_record import ErrorRecord
from launcher.worker.record import RankExit

_POLL_S = 0.2


def run_ranks(
    arguments: Sequence[str],
    rendezvous: RendezvousHandler,
    *,
    num_ranks: int,
    max_restarts: int,
    address: str,
    folder: Path,
    on_failure: Callable[[list[RankExit]], None],
) -> bool:
    """Run `num_ranks` processes of Python with these arguments until all have succeeded; returns whether they have.

    `on_failure` is told how ranks of this node have ended, each time that some have failed. What ranks leave is in `folder`.

    Raises:
        RendezvousClosedError: where ranks need not be started again.
        Exception: whatever else keeps the agent from its work.
    """
    # Elastic's own handlers kill the ranks on TERM after 30 s; the agent's let them save. QUIT keeps the quick way.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    spec = WorkerSpec(
        role="default_role",
        local_world_size=num_ranks,
        rdzv_handler=rendezvous,
        entrypoint=sys.executable,
        args=tuple(arguments),
        max_restarts=max_restarts,
        monitor_interval=_POLL_S,
        local_addr=address,
    )
    return not _Agent(spec, _Records(str(folder)), on_failure).run().is_failed()


class _Records(DefaultLogsSpecs):
    """Knows where the ranks of the newest start leave their records (`files`, by local rank), and keeps that from torch.

    The agent reads the record of every failed rank before it decides on a restart, and parses it without a guard: one that is
    empty, or no record, would leave the agent as an exception and end a run that has restarts left. There is no hook around
    that reading, but a rank whose file is the null device is one without a record.
    """

    files: dict[int, Path]

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        destinations = super().reify(envs)
        self.files = {local_rank: Path(file) for local_rank, file in destinations.error_files.items()}
        return replace(destinations, error_files=dict.fromkeys(self.files, os.devnull))


class _Agent(LocalElasticAgent):
    """Tells of every failure; torch tells of the last one only."""

    def __init__(self, spec: WorkerSpec, records: _Records, on_failure: Callable[[list[RankExit]], None]) -> None:
        super().__init__(spec, records)
        self._records, self._on_failure = records, on_failure

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            self._on_failure([self._exit(rank, failure) for rank, failure in result.failures.items()])
        return result

    def _exit(self, rank: int, failure: Any) -> RankExit:
        error = ErrorRecord.read(self._records.files[failure.local_rank])
        at = failure.timestamp if error is None or error.at is None else error.at
        return RankExit(rank, failure.exitcode, at, error)
