"""The supervisor of a node: it checks the node, starts a rank per GPU, watches them, and records how they ended.

It is the same on every backend, which starts an agent on each node: a process that calls `NodeAgent.start` and `supervise`, and
tells where the nodes meet and what its signals mean. launcher.worker.local is the shortest.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import launcher
from launcher import clock, collect_garbage_rarely
from launcher.checkpoint import store as checkpoints
from launcher.clusters import check_results, network
from launcher.clusters.limits import LimitEvents, cause_of, record_limits
from launcher.config.sections.cluster import ManagedSection
from launcher.errors import LauncherError, Problem, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, journal, json_records, run_records, run_store
from launcher.runs.journal import FailureRecord, NodeEnded, RanksRestarted
from launcher.runs.run_records import Attempt
from launcher.security.folders import private_variables
from launcher.tracking.jsonl import append_event
from launcher.train.previous_failure import RESTART
from launcher.worker import failure_record, postmortem
from launcher.worker.failure_record import ErrorMemory
from launcher.worker.ranks.flight_recorder import FlightRecorder
from launcher.worker.ranks.rank_env import NodeInfo, allocator_defaults
from launcher.worker.ranks.rank_process import RankProcesses
from launcher.worker.ranks.watchdog import HEARTBEATS_VARIABLE, HeartbeatTable, Watchdog
from launcher.worker.sidecars import sidecar
from launcher.worker.sidecars.sidecar import AFTER_FAILURE_S, Sidecar
from launcher.worker.signals import CANCEL, Stopper

# Nodes usually start within seconds of each other; a prologue, a container or a slow file system may take minutes. Before a
# restart, stopping the ranks can take half a minute.
_MEET_DEADLINE_S = 300.0
# How often to look for requests in the run directory.
_LOOK_S = 0.5


@dataclass(frozen=True)
class NodeAgent:
    """One node's part of an attempt. `started_at` is in seconds since the epoch."""

    plan: LaunchPlan
    plan_path: str
    run: RunDir
    attempt: int
    stopper: Stopper
    ranks: RankProcesses
    started_at: float

    @classmethod
    def start(cls, plan_path: str, attempt: int, signals: Mapping[signal.Signals, signal.Signals]) -> NodeAgent | None:
        """Read the plan, listen for `signals` and import what ranks need. Return None, with a message, if the plan is unreadable.

        `signals` maps each signal to the one that is sent to the ranks: CANCEL or PREEMPT.
        """
        try:
            plan = LaunchPlan.load(plan_path)
        except OSError as error:
            print(f"{network.node_name()} does not see the run directory: {error}", file=sys.stderr)
            return None
        started_at = clock.now()
        collect_garbage_rarely()
        ranks = RankProcesses(Path(plan.run_dir))
        stopper = Stopper(plan.config.cluster.stop_grace_seconds, signals, ranks.send_signal).install()
        os.environ.update(private_variables(os.environ))
        # Python has noted the folder before.
        tempfile.tempdir = None
        cores = len(os.sched_getaffinity(0))
        os.environ.update(allocator_defaults(os.environ, plan.topology.device))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.topology.ranks_per_node)))
        ranks.warm_up(plan_path, os.environ)
        return cls(plan, plan_path, RunDir(Path(plan.run_dir)), attempt, stopper, ranks, started_at)

    def watch_requests(self, look: Callable[[], None] = lambda: None) -> None:
        """Follow requests to cancel that any machine has written, in a thread; it calls `look` as often as it looks."""
        is_shared = not self.plan.config.cluster.is_this_machine

        def watch() -> None:
            while True:
                # Storage may fail for a while.
                with suppress(OSError, LauncherError):
                    if is_shared:
                        atomic_files.refresh_directory(self.run.attempt(self.attempt))
                    if (request := run_records.read_cancel(self.run, self.attempt)) is not None:
                        self.stopper.cancel(request.save)
                    look()
                time.sleep(_LOOK_S)

        threading.Thread(target=watch, name="requests", daemon=True).start()

    def supervise(
        self,
        place: Attempt,
        number: int,
        log: Path,
        *,
        conclude: Callable[[NodeEnded], bool] = lambda record: record.first_failure is None,
        why_ended: Callable[[], str] = str,
        answers_s: float = math.inf,
        after_failure_s: float = AFTER_FAILURE_S,
    ) -> NodeEnded:
        """Run node `number` of an attempt to its end, and return its record.

        The nodes of `place` meet at its address and port. When the ranks have ended and the record is written, `conclude`
        receives it and returns whether the run is complete. Then the head node's other processes get time to finish: answers get
        `answers_s` seconds if the run is complete; the mirror gets `after_failure_s` if the ranks failed, and no limit otherwise.
        For `log` and `why_ended` see `run_ranks`.
        """
        mirror: Sidecar | None = None
        answers: Sidecar | None = None
        failure: FailureRecord | None = None
        problems: list[Problem] = []
        record_limits(self.run, self.attempt, number)
        if self.run.cancel(self.attempt).is_file():
            # Requested before this process listened for signals.
            self.stopper.request(CANCEL)
        try:
            node = node_info(self.plan, place, number)
            store = connect_to_head(place, node)
            problems = self._check_nodes(store, place, node)
            if not problems and not self.stopper.requested:
                if node.is_head:
                    mirror = sidecar.start_mirror(self.plan, self.plan_path, self.run, self.attempt)
                    answers = sidecar.start_answers(self.plan, self.plan_path, self.run, self.attempt)
                failure = self.run_ranks(node, store, log, why_ended)
        except Exception as error:
            failure = failure_record.from_exception(error, log, cause_of(error, self.run.root))
        self.stopper.disarm()
        self.ranks.close()
        record = NodeEnded(
            node=number,
            host=place.nodes[number],
            started_at=self.started_at,
            stopped=self.stopper.requested,
            killed=self.stopper.killed,
            first_failure=failure,
            problems=tuple(problems),
        )
        # Every node knows the problems of all nodes: the head node records them, the others their own.
        own = tuple(problem for problem in problems if number == 0 or problem.where == record.host)
        with suppress(OSError):
            journal.append(self.run, self.attempt, replace(record, problems=own))
        is_complete = conclude(record) and not self.stopper.requested
        self.stopper.finish(answers, answers_s if is_complete else 0.0, uses_grace=False)
        self.stopper.finish(mirror, math.inf if failure is None else after_failure_s)
        return record

    def _check_nodes(self, store: Any, record: Attempt, here: NodeInfo) -> list[Problem]:
        """Return the problems of all nodes of the attempt, the same list on each node; empty if all are fit."""
        if not getattr(self.plan.config.cluster, "node_checks", False):
            return []
        from launcher.worker.checks import node_check

        report = node_check.check_node(self.plan, self.attempt)
        imported = Path(launcher.__file__).resolve()
        if not imported.is_relative_to(self.run.code.resolve()):
            seen = f"runs a different launcher from the one submitted: {imported.parent}"
            foreign = check_results.failure(seen, "unset PYTHONPATH in the container or in the environment of the node")
            report = replace(report, results=(*report.results, foreign))
        return node_check.exchange(store, report, record.nodes, here.node, _MEET_DEADLINE_S)

    def run_ranks(self, node: NodeInfo, store: Any, log: Path, why_ended: Callable[[], str] = str) -> FailureRecord | None:
        """Run the ranks of this node to their end; returns the first failure or None.

        `store` is the TCPStore that the nodes share, `log` the file with the agent's output. `why_ended` returns why the caller
        killed the ranks for good, or an empty string if it did not.
        """
        # These import torch.
        from launcher.worker.ranks import elastic
        from launcher.worker.ranks.elastic import NodeRendezvous

        topology, cluster = self.plan.topology, self.plan.config.cluster
        if node.interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", node.interface)
            # NCCL treats a bare name as a prefix.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={node.interface}")
        run_id = f"{self.plan.wandb_id}-{self.attempt}"
        failures = _FailureLog(self.run, self.attempt, node, log, why_ended)
        rendezvous = NodeRendezvous(
            store, run_id, node, _MEET_DEADLINE_S, failures.is_final, failures.describe_own, failures.report_restart
        )
        heartbeats = HeartbeatTable(topology.ranks_per_node)
        errors = ErrorMemory(topology.ranks_per_node)
        os.environ |= {HEARTBEATS_VARIABLE: str(heartbeats.path), failure_record.ERROR_MEMORY_VARIABLE: str(errors.path)}
        shared = store if len(node.hosts) > 1 else None
        recorder = FlightRecorder(self.run, self.attempt, topology.world_size, cluster.stall_seconds)
        os.environ.update(recorder.variables)
        limits = cluster.stall_seconds, cluster.timeout_minutes * 60
        watchdog = Watchdog(heartbeats, *limits, failures.add_stall, shared, recorder.request, recorder.explain).start()
        try:
            succeeded = elastic.run_ranks(
                partial(self.ranks.start, self.plan_path, self.attempt),
                rendezvous,
                num_ranks=topology.ranks_per_node,
                max_restarts=cluster.max_restarts,
                address=node.address,
                on_failure=failures.set_exits,
                errors=errors,
            )
            return None if succeeded else failures.first()
        except Exception as error:
            return failures.from_exception(error)
        finally:
            watchdog.stop()
            heartbeats.close()
            errors.close()
            recorder.close(os.environ)
            # Otherwise offloaded states would keep filling the disk of a node that the run no longer uses.
            if self.plan.nvme_folder is not None and run_store.newest_attempt(self.run) == self.attempt:
                shutil.rmtree(self.plan.nvme_folder, ignore_errors=True)


class _FailureLog:
    """The failures of this node's ranks since their last start: exits, watchdog messages, and limits reached."""

    def __init__(self, run: RunDir, attempt: int, node: NodeInfo, log: Path, why_ended: Callable[[], str]) -> None:
        self._run, self._attempt, self._log, self._why_ended = run, attempt, log, why_ended
        self._host = node.hosts[node.node] if len(node.hosts) > 1 else ""
        self._exits: list[failure_record.RankExit] = []
        self._stalls: list[str] = []
        self._limits = LimitEvents.read()
        # The failure of the ranks that are about to be restarted.
        self._last: FailureRecord | None = None

    def set_exits(self, exits: list[failure_record.RankExit]) -> None:
        self._exits = exits

    def add_stall(self, message: str) -> None:
        self._stalls.append(message)
        # A full disk must not end the watchdog, whose thread calls this.
        with suppress(OSError):
            print(message, flush=True)

    def describe_own(self) -> str:
        """Return the first failure of this node's ranks as JSON, empty if none failed, and reset the log for the next start."""
        self._last = self.first() if self._exits else None
        self._exits, self._stalls, self._limits = [], [], LimitEvents.read()
        return "" if self._last is None else json.dumps(json_records.encode(self._last))

    def report_restart(self, count: int, failures: list[str]) -> str:
        """Record the `count`-th restart of all ranks and its cause; returns why they are not restarted, empty if they are."""
        records = [json_records.decode(FailureRecord, json.loads(text), "the store") for text in failures if text]
        first = failure_record.first_of(records)
        reason = first.line if first is not None else "torch's elastic agent reported no failed rank"
        # A full disk or a damaged record must not prevent the restart.
        with suppress(OSError, LauncherError):
            if first is not None:
                if repetition := postmortem.describe_repetition(self._run, self._attempt, first):
                    return repetition
                saved_step = checkpoints.newest_step(self._run.checkpoints)
                journal.append(self._run, self._attempt, RanksRestarted(first_failure=first, saved_step=saved_step))
        with suppress(OSError):
            text = f"all ranks are restarted (restart {count}): {reason}"
            append_event(self._run, self._attempt, "alert", text, **{RESTART: count})
        return ""

    def is_final(self) -> bool:
        """Return whether a rank recorded a failure that a restart would repeat, or the ranks were killed for good."""
        return bool(self._why_ended()) or failure_record.read_final(self._run, self._attempt) is not None

    def first(self) -> FailureRecord:
        limit = LimitEvents.read().cause_since(self._limits)
        failure = failure_record.from_rank_exits(self._exits, self._run, self._attempt, self._stalls, limit)
        if (reason := self._why_ended()) and failure.exit_code == -signal.SIGKILL:
            # This exit is a consequence and must not count as the first failure.
            failure = replace(failure, kind="exit", message=reason)
        return replace(failure, host=self._host)

    def from_exception(self, error: Exception) -> FailureRecord | None:
        """Return the failure behind an exception of torch's agent; None if only failures of other nodes prevent the restart."""
        from torch.distributed.elastic.rendezvous import RendezvousClosedError

        final = failure_record.read_final(self._run, self._attempt) if isinstance(error, RendezvousClosedError) else None
        if final is not None:
            return replace(final, host=self._host)
        if isinstance(error, RendezvousClosedError):
            return self.first() if self._exits else self._last
        # Rendezvous, resources and the like: no rank is to blame.
        failure = failure_record.from_exception(error, self._log, cause_of(error, self._run.root))
        return replace(failure, host=self._host)


def node_info(plan: LaunchPlan, record: Attempt, node: int) -> NodeInfo:
    """Return this node's index, hosts and address; the agents meet at the head node's address."""
    if record.address is None or record.port is None:
        raise RunError("the attempt has no address and port of the head node", where="attempt.json", remedy="resume the run")
    if node == 0:
        return NodeInfo(node, record.nodes, record.address, record.interface)
    endpoint = network.own_endpoint([record.address], ManagedSection.of(plan.config.cluster).interface)
    return NodeInfo(node, record.nodes, endpoint.address, endpoint.interface)


def connect_to_head(record: Attempt, here: NodeInfo) -> Any:
    """Return the head node's TCPStore, which all nodes share."""
    from torch.distributed import DistNetworkError

    from launcher.distributed import open_store

    assert record.address is not None
    assert record.port is not None
    if not (here.is_head or network.await_reachable(record.address, record.port, _MEET_DEADLINE_S)):
        raise RunError(
            f"{network.node_name()} cannot reach the head node at {record.address}:{record.port}",
            where=f"{here.address} on {here.interface}",
            remedy="set cluster.interface to the network that joins the nodes",
        )
    deadline = timedelta(seconds=_MEET_DEADLINE_S)
    try:
        return open_store(record.address, record.port, is_server=here.is_head, timeout=deadline)
    except (DistNetworkError, OSError) as error:
        raise RunError(
            "the agents of the nodes cannot connect",
            where=f"{record.address}:{record.port}",
            value=str(error).splitlines()[0],
        ) from None
