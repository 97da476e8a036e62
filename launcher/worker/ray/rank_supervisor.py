"""The training function in each Ray Train worker: it checks the node, starts one rank, watches it, and tells the coordinator.

The rank is a separate process, started as on every other backend; this process never imports torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from launcher import run_store
from launcher.clusters import detached_process, network
from launcher.clusters.check_results import CheckResult, MachineReport, failure
from launcher.clusters.limits import LimitEvents, cause_of, record_limits
from launcher.clusters.node_command import blocked_signals
from launcher.config.sections.ray import RaySection
from launcher.errors import describe
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import journal
from launcher.runs.journal import FailureRecord, NodeEnded
from launcher.security.folders import private_variables
from launcher.worker import failure_record
from launcher.worker.checks import node_check
from launcher.worker.failure_record import ErrorMemory, ErrorRecord
from launcher.worker.ranks.flight_recorder import FlightRecorder
from launcher.worker.ranks.rank_env import allocator_defaults
from launcher.worker.ranks.rank_process import RankProcess, RankProcesses
from launcher.worker.ranks.watchdog import HEARTBEATS_VARIABLE, HeartbeatTable, LoadProgress
from launcher.worker.ray.coordinator import WORKER_CALL_S, CoordinatorLost, call_coordinator
from launcher.worker.ray.messages import (
    Assignment,
    BeatReply,
    CheckNode,
    Leave,
    Member,
    Orders,
    RankResult,
    RankSign,
    Setup,
    Train,
    Verdict,
)
from launcher.worker.sidecars.sidecar import AFTER_FAILURE_S, Sidecar, start_answers, start_mirror
from launcher.worker.signals import CANCEL, DISMISSED, PREEMPT

_POLL_S = 0.2
# Seconds from TERM to KILL, if a rank does not end by itself.
_KILL_AFTER_S = 5.0
# Seconds to reach all other nodes together, and the minimum for each.
_REACH_S, _MIN_REACH_S = 30.0, 2.0
_SHARED_REMEDY = "set run.root to a folder on storage that all nodes share"


class AttemptEnded(Exception):
    """Makes Ray Train start the workers again; the run directory says what happened."""


@dataclass
class _Watched:
    """What happened to a rank while it ran: the coordinator's messages on its hang, and when each signal was first sent."""

    stalls: list[str] = field(default_factory=list)
    sent_at: dict[str, float] = field(default_factory=dict)

    @property
    def was_asked_to_stop(self) -> bool:
        return bool(self.sent_at.keys() - {"TERM"})

    @property
    def expected_exit_codes(self) -> set[int]:
        """A rank that receives a signal before it listens is ended by that signal."""
        codes = {-signal.Signals[f"SIG{name}"] for name in self.sent_at}
        return codes | {-signal.SIGKILL, DISMISSED} if "TERM" in self.sent_at else codes


def supervise(config: dict[str, Any]) -> None:
    """Take part in one attempt, as the training function of Ray Train.

    A worker that lost its coordinator returns as if training were complete: Ray Train then ends, and the driver restarts it with
    the next coordinator.

    Raises:
        AttemptEnded: if another attempt follows.
    """
    os.umask(0o077)
    try:
        verdict = _take_part(config["coordinator"], config["interface"])
    except CoordinatorLost:
        return
    if verdict.again:
        raise AttemptEnded(verdict.reason)


def _take_part(coordinator: Any, interface: str | None) -> Verdict:
    """Return the verdict on the attempt; failures before the worker has entered are reported to the coordinator."""
    import ray

    try:
        worker = _Worker(coordinator, interface)
        worker.enter()
    except Exception as error:
        with suppress(Exception):
            message = f"{os.uname().nodename}: {describe(error)}"
            ray.get(coordinator.report_early_failure.remote(message), timeout=WORKER_CALL_S)
        raise
    try:
        return worker.run()
    except CoordinatorLost:
        # The driver records it for all workers.
        raise
    except Exception as error:
        worker.record_failure(error)
        raise
    finally:
        worker.ranks.close()


class _Worker:
    """`rank` is the worker's rank in its group; the assignment holds the rank that it starts."""

    def __init__(self, coordinator: Any, interface: str | None) -> None:
        import ray
        from ray import train
        from ray.train import collective

        context = train.get_context()
        self._coordinator = coordinator
        self.rank, self.local_rank = context.get_world_rank(), context.get_local_rank()
        self.size = context.get_world_size()
        self.group_id = collective.broadcast_from_rank_zero(uuid.uuid4().hex)
        self.node_id = ray.get_runtime_context().get_node_id()
        self.node = next((n.get("NodeName") for n in ray.nodes() if n["NodeID"] == self.node_id), None) or os.uname().nodename
        self.address = network.own_endpoint([], interface).address if interface else ray.util.get_node_ip_address()
        self.port = network.free_port(self.address)
        # Once it knows who trains, the coordinator chooses the worker at whose port the ranks meet.
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self.listener = socket.create_server((self.address, self.port), family=family, backlog=128)
        self.ranks = RankProcesses()
        # None until orders arrive.
        self.assignment: Assignment | None = None

    def enter(self) -> None:
        """Register with the coordinator, and start a fork server that imports what the rank needs while the nodes are checked."""
        member = Member(self.rank, self.local_rank, self.node, self.node_id, self.address, self.port)
        setup: Setup = call_coordinator(self._coordinator, "enter", self.group_id, self.size, member)
        try:
            planned = LaunchPlan.load(setup.plan_path)
        except OSError:
            # The node check reports that this node does not see the run directory.
            return
        self.ranks = RankProcesses(Path(planned.run_dir))
        with blocked_signals(CANCEL, PREEMPT, signal.SIGTERM):
            self.ranks.warm_up(setup.plan_path, _node_environment(planned, setup.environment))

    def run(self) -> Verdict:
        """Follow the coordinator's orders until the attempt has a verdict."""
        try:
            orders = self._next_orders()
            if isinstance(orders, CheckNode):
                report = check_node(self.node, orders)
                call_coordinator(self._coordinator, "report_check", self.group_id, self.rank, report)
                orders = self._next_orders()
        finally:
            self.listener.close()
        if isinstance(orders, Leave):
            return Verdict(False, orders.reason)
        result = self._train(orders) if isinstance(orders, Train) else None
        while (verdict := self._beat(result).verdict) is None:
            time.sleep(_POLL_S)
        return verdict

    def record_failure(self, error: Exception) -> None:
        """Write the node record of a worker that failed outside its rank, and tell the coordinator."""
        if self.assignment is None:
            return
        assignment = self.assignment
        with suppress(Exception):
            run = RunDir(Path(LaunchPlan.load(assignment.plan_path).run_dir))
            if journal.read_node(run, assignment.attempt, assignment.rank) is None:
                # The driver's log is in the folder of the submitted attempt.
                logs = [run.agent_log(number) for number in range(assignment.attempt, 0, -1)]
                log = next((log for log in logs if log.is_file()), run.attempt(assignment.attempt))
                failure = failure_record.from_exception(error, log, at=time.time(), limit=cause_of(error, run.root))
                journal.append(run, assignment.attempt, NodeEnded(node=assignment.rank, host=self.node, first_failure=failure))
            call_coordinator(self._coordinator, "beat", self.group_id, self.rank, RankResult.FAILED)

    def _next_orders(self) -> Orders:
        while (orders := call_coordinator(self._coordinator, "orders", self.group_id, self.rank)) is None:
            time.sleep(_POLL_S)
        next_orders: Orders = orders
        self.assignment = next_orders.assignment if isinstance(next_orders, CheckNode | Train) else None
        return next_orders

    def _beat(self, result: RankResult | None, sign: RankSign | None = None) -> BeatReply:
        """Send a heartbeat to the coordinator."""
        reply: BeatReply = call_coordinator(self._coordinator, "beat", self.group_id, self.rank, result, sign)
        return reply

    def _train(self, orders: Train) -> RankResult:
        """Start this worker's rank, watch it to its end, record the end, and wait for answers and the mirror."""
        assignment = orders.assignment
        plan = LaunchPlan.load(assignment.plan_path)
        run, attempt = RunDir(Path(plan.run_dir)), assignment.attempt
        started_at = time.time()
        table, errors = HeartbeatTable(self.local_rank + 1), ErrorMemory(self.local_rank + 1)
        record_limits(run, attempt, assignment.rank)
        limits = LimitEvents.read()
        mirror: Sidecar | None = None
        answers: Sidecar | None = None
        if assignment.rank == 0:
            environ = {**os.environ, **orders.environment, **RaySection.of(plan.config.cluster).env}
            environ |= private_variables(environ)
            mirror = start_mirror(plan, assignment.plan_path, run, attempt, environ)
            answers = start_answers(plan, assignment.plan_path, run, attempt, environ)
        environment = self._rank_environment(plan, orders, table, errors)
        recorder = FlightRecorder(run, attempt, plan.topology.world_size, plan.config.cluster.stall_seconds)
        environment.update(recorder.variables)
        while self.ranks.is_warming_up():
            # On slow storage, imports take minutes, and a worker without heartbeats counts as lost.
            self._beat(None)
            time.sleep(_POLL_S)
        # Signals are blocked from the rank's first instruction on: one that arrives during its imports stays pending until it
        # listens.
        with blocked_signals(CANCEL, PREEMPT, signal.SIGTERM):
            rank = self.ranks.start(assignment.plan_path, attempt, environment)
        # Another attempt has different workers.
        self.ranks.close()
        try:
            observer = Observer(table, self.local_rank, plan.config.cluster.stall_seconds)
            watched = self._watch(rank, observer, recorder, assignment.rank)
        finally:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
            table.close()
            recorder.close(environment)
        error = errors.read(self.local_rank, rank.pid)
        errors.close()
        limit = LimitEvents.read().cause_since(limits)
        failure = _find_failure(run, assignment, rank.returncode, watched, error, limit)
        record = NodeEnded(
            node=assignment.rank,
            host=self.node,
            started_at=started_at,
            stopped=watched.was_asked_to_stop,
            killed="KILL" in watched.sent_at,
            first_failure=failure,
        )
        journal.append(run, attempt, record)
        if failure is not None:
            # The other ranks wait for this one, and must not wait for the mirror as well.
            self._beat(RankResult.FAILED)
        if answers is not None:
            until = float("inf") if failure is None and not watched.sent_at else 0.0
            answers.finish(until, lambda: self._is_wanted_elsewhere(failure is not None))
        if mirror is not None:
            # The last checkpoint may take as long as it needs, unless another attempt waits or a person cancels again.
            is_urgent = failure is not None or {"TERM", "USR2"} & watched.sent_at.keys()
            until = time.monotonic() + AFTER_FAILURE_S if is_urgent else float("inf")
            mirror.finish(until, lambda: self._is_wanted_elsewhere(failure is not None))
        # Otherwise the offloaded states would keep filling the disk of a node that the run no longer uses.
        with suppress(OSError):
            if plan.nvme_folder is not None and self.local_rank == 0 and run_store.newest_attempt(run) == attempt:
                shutil.rmtree(plan.nvme_folder, ignore_errors=True)
        return RankResult.DONE if failure is None else RankResult.FAILED

    def _watch(self, rank: RankProcess, observer: Observer, recorder: FlightRecorder, number: int) -> _Watched:
        """Send heartbeats until the rank has ended, and forward the coordinator's signals to it."""
        watched = _Watched()
        while rank.poll() is None:
            reply = self._beat(None, observer.read_sign(rank.pid))
            if reply.dump_stacks:
                rank.send_signal(signal.SIGQUIT)
                recorder.request([number])
            if reply.hang is not None and not watched.stalls:
                watched.stalls.append("; ".join(filter(None, (reply.hang, recorder.explain()))))
                rank.kill()
            elif reply.signal is not None:
                sent_at = watched.sent_at.setdefault(reply.signal, time.monotonic())
                is_late = reply.signal == "TERM" and time.monotonic() - sent_at > _KILL_AFTER_S
                rank.send_signal(signal.SIGKILL if is_late else signal.Signals[f"SIG{reply.signal}"])
            with suppress(subprocess.TimeoutExpired):
                rank.wait(_POLL_S)
        return watched

    def _is_wanted_elsewhere(self, failed: bool) -> bool:
        """Return whether the mirror must be interrupted; if this worker's own rank failed, TERM is for the other ranks."""
        reply = self._beat(None)
        again = reply.verdict is not None and reply.verdict.again
        return again or reply.signal == "KILL" or (reply.signal == "TERM" and not failed)

    def _rank_environment(self, plan: LaunchPlan, orders: Train, table: HeartbeatTable, errors: ErrorMemory) -> dict[str, str]:
        section, assignment = RaySection.of(plan.config.cluster), orders.assignment
        environment = {
            **_node_environment(plan, orders.environment),
            "RANK": str(assignment.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(assignment.world_size),
            "LOCAL_WORLD_SIZE": str(assignment.local_world_size),
            "MASTER_ADDR": assignment.address if len(assignment.peers) > 1 else network.LOOPBACK.address,
            "MASTER_PORT": str(assignment.port),
            HEARTBEATS_VARIABLE: str(table.path),
            failure_record.ERROR_MEMORY_VARIABLE: str(errors.path),
        }
        endpoint = network.LOOPBACK
        if len(assignment.peers) > 1:
            endpoint = network.own_endpoint(assignment.peers, section.interface)
        environment.setdefault("GLOO_SOCKET_IFNAME", endpoint.interface)
        # NCCL treats a bare name as a prefix.
        environment.setdefault("NCCL_SOCKET_IFNAME", f"={endpoint.interface}")
        return environment


class Observer:
    """Reads the rank's last heartbeat. Silence counts only while the worker itself was running."""

    def __init__(self, table: HeartbeatTable, local_rank: int, stall_s: float) -> None:
        self._table, self._local_rank, self._gap_s = table, local_rank, stall_s / 2
        self._looked = self._since = time.monotonic()
        self._progress = LoadProgress()

    def read_sign(self, pid: int) -> RankSign | None:
        """Return the last heartbeat of the process `pid`, or None if it has sent none or has ended.

        The seconds in it count from the heartbeat or, for a loading rank, from its last progress.
        """
        now = time.monotonic()
        if now - self._looked > self._gap_s:
            # This process was suspended, and perhaps its rank too.
            self._since = now
        self._looked = now
        beat = self._table.read().get(self._local_rank)
        if beat is None or beat.pid != pid:
            return None
        beat = self._progress.update({self._local_rank: beat}, now)[self._local_rank]
        try:
            state = psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            return None
        return RankSign(beat, max(0.0, now - max(beat.at, self._since)), state)


def _find_failure(
    run: RunDir, assignment: Assignment, exit_code: int | None, watched: _Watched, error: ErrorRecord | None, limit: str
) -> FailureRecord | None:
    """Return the failure of a rank that has ended, or None if it succeeded or ended on request.

    `limit` is the limit that the kernel enforced while the rank ran.
    """
    # A hung rank was killed before any other signal, however long it took to end.
    if not exit_code or (not watched.stalls and exit_code in watched.expected_exit_codes):
        return None
    final = failure_record.read_final(run, assignment.attempt)
    if final is not None and final.rank == assignment.rank:
        return final
    end = failure_record.RankExit(assignment.rank, exit_code, time.time() if error is None else error.at or time.time(), error)
    return failure_record.from_exit(end, run, assignment.attempt, watched.stalls, limit)


def _node_environment(plan: LaunchPlan, from_driver: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that all ranks of this node share, including those from the driver."""
    cores = len(os.sched_getaffinity(0))
    environment = {
        **os.environ,
        **from_driver,
        # Ray sets this to the number of CPUs that the actor requested, which is low or zero.
        "OMP_NUM_THREADS": str(max(1, cores // plan.topology.ranks_per_node)),
        **detached_process.python_variables(RunDir(Path(plan.run_dir)).code, os.environ),
        **RaySection.of(plan.config.cluster).env,
    }
    # Last, because they follow from cluster.env, such as its TMPDIR.
    return {**allocator_defaults(environment, plan.topology.device), **environment, **private_variables(environment)}


def check_node(node: str, orders: CheckNode) -> MachineReport:
    """Check this node, whose Ray name is `node`, and whether it can reach the others."""
    assignment = orders.assignment
    plan_path, attempt = Path(assignment.plan_path), assignment.attempt
    try:
        plan = LaunchPlan.load(plan_path)
    except OSError as error:
        seen = f"the run directory is not visible: {plan_path}: {error.strerror}"
        return MachineReport(node, (failure(seen, _SHARED_REMEDY),))
    run = RunDir(Path(plan.run_dir))
    report = node_check.check_node(plan, attempt, assignment.local_world_size)
    results, marker = [*report.results], run.attempt(attempt) / "marker"
    if not report.problems and (not marker.is_file() or marker.read_text() != assignment.marker):
        seen = f"the run directory differs from the head node's: it lacks a file of this attempt: {run.root}"
        results.append(failure(seen, _SHARED_REMEDY))
    return MachineReport(node, (*results, *find_unreachable(node, orders.others, _REACH_S)))


def find_unreachable(node: str, others: Sequence[tuple[str, str, int]], deadline_s: float) -> list[CheckResult]:
    """Return a failure for each of the `others` (node, address and port) that `node` cannot connect to.

    If it can reach none of them, it is to blame itself.
    """
    until = time.monotonic() + deadline_s
    lost = [
        (name, f"{address}:{port}")
        for name, address, port in others
        if network.await_reachable(address, port, max(_MIN_REACH_S, until - time.monotonic())) is None
    ]
    remedy = "open all ports between the nodes, or set cluster.interface to the network that joins them"
    if lost and len(lost) == len(others):
        return [failure(f"cannot reach {', '.join(f'{name} at {address}' for name, address in lost)}", remedy)]
    return [replace(failure(f"cannot be reached from {node} at {address}", remedy), machine=name) for name, address in lost]
