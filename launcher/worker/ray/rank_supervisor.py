"""What runs in each worker of Ray Train: it starts one rank, watches it, and carries words between it and the coordinator.

The rank is a process of its own, started as on every other backend; this one never imports torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import error_record, json_records, run_store
from launcher.clusters import detached_process
from launcher.config.ray import RaySection
from launcher.errors import LauncherError, Problem
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import NodeRecord, node_file
from launcher.worker import failure_record, heartbeat
from launcher.worker.checks import network, node_check
from launcher.worker.mirror_process import AFTER_FAILURE_S, MirrorProcess
from launcher.worker.rank_process import RankProcesses
from launcher.worker.ray.checkpoint_reports import Reporter
from launcher.worker.ray.coordinator_actor import deaths
from launcher.worker.ray.watchdog import Observer
from launcher.worker.signals import CANCEL, DISMISSED, PREEMPT

_ASK_S = 0.2
# Asked again after that, well before a worker counts as silent.
_CALL_S = 20.0
_PATIENCE_S = 900.0
# For all other nodes together, and what each gets at the least.
_REACH_S, _LEAST_REACH_S = 30.0, 2.0
# From TERM to KILL, where a rank does not go by itself.
_KILL_AFTER_S = 5.0
# For what Ray Train is still to be told when all is done.
_REPORT_S = 30.0


class AttemptEnded(Exception):
    """Tells Ray Train that the workers are to be started again; what happened stands in the run directory."""


class CoordinatorLost(Exception):
    """The coordinator that this worker asks is gone."""


def supervise(config: dict[str, Any]) -> None:
    """The training function of Ray Train: take part in one attempt.

    Without its coordinator a worker returns as if all were done: Ray Train then ends, and the driver begins it anew with the one
    that follows.

    Raises:
        AttemptEnded: where another attempt is to follow.
    """
    try:
        verdict = _take_part(config["coordinator"], config["interface"])
    except CoordinatorLost:
        return
    if verdict["again"]:
        raise AttemptEnded(verdict["reason"])


def _take_part(coordinator: Any, interface: str | None) -> dict[str, Any]:
    """The verdict on the attempt. What goes wrong before a rank is there is told too, and not only that a word is missing."""
    import ray

    try:
        worker = _Worker(coordinator, interface)
        worker.enter()
    except Exception as error:
        with suppress(Exception):
            ray.get(coordinator.failed_early.remote(f"{os.uname().nodename}: {_words(error)}"), timeout=_CALL_S)
        raise
    try:
        return worker.run()
    except Exception as error:
        worker.give_up(error)
        raise
    finally:
        worker.ranks.close()


def _words(error: Exception) -> str:
    return error.problems[0].what if isinstance(error, LauncherError) else f"{type(error).__name__}: {error}"


@contextmanager
def _blocked_signals() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {CANCEL, PREEMPT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """`rank` is the worker's in its group; that of the rank which it starts comes with its orders."""

    def __init__(self, coordinator: Any, interface: str | None) -> None:
        import ray
        from ray import train
        from ray.train import collective

        context = train.get_context()
        self._coordinator = coordinator
        self._get = ray.get
        self.rank, self.local_rank = context.get_world_rank(), context.get_local_rank()
        self.size = context.get_world_size()
        self.group = collective.broadcast_from_rank_zero(uuid.uuid4().hex)
        self.node_id = ray.get_runtime_context().get_node_id()
        self.node = next((n.get("NodeName") for n in ray.nodes() if n["NodeID"] == self.node_id), None) or os.uname().nodename
        self.address = network.own_endpoint([], interface).address if interface else ray.util.get_node_ip_address()
        self.port = network.free_port(self.address)
        # Which worker the ranks meet at is known when it is known who trains.
        self.listener = network.Listener(self.address, self.port)
        self.reporter = Reporter(self.rank)
        self.ranks = RankProcesses()
        # The attempt, once it is known.
        self.orders: dict[str, Any] = {}

    def enter(self) -> None:
        member = {
            "rank": self.rank,
            "local_rank": self.local_rank,
            "node": self.node,
            "node_id": self.node_id,
            "address": self.address,
            "port": self.port,
        }
        self._warm_up(**self._call("enter", self.group, self.size, member))

    def run(self) -> dict[str, Any]:
        """The verdict on the attempt."""
        try:
            self.orders = self._next_orders()
            if self.orders["do"] == "check":
                self._call("checked", self.group, self.rank, self._check(self.orders).to_json())
                self.orders = self._next_orders()
        finally:
            self.listener.close()
        if self.orders["do"] == "leave":
            return {"again": False, "reason": self.orders["why"]}
        ended = self._train(self.orders) if self.orders["do"] == "train" else None
        while (answer := self._beat(ended))["verdict"] is None:
            time.sleep(_ASK_S)
        verdict: dict[str, Any] = answer["verdict"]
        if not verdict["again"]:
            self.reporter.finish(_REPORT_S)
        return verdict

    def give_up(self, error: Exception) -> None:
        """Leave a record of what kept this worker from its part."""
        if "rank" not in self.orders:
            return
        with suppress(Exception):
            run, attempt = RunDir(Path(LaunchPlan.load(self.orders["plan"]).run_dir)), self.orders["attempt"]
            file = node_file(run, attempt, self.orders["rank"])
            if not file.is_file():
                failure = failure_record.from_exception(error, run.attempt(attempt), at=time.time())
                json_records.write(file, NodeRecord(self.orders["rank"], time.time(), host=self.node, first_failure=failure))
            self._call("beat", self.group, self.rank, "failed")

    def _call(self, method: str, *arguments: Any) -> Any:
        """Ask the coordinator; one that is slow, because storage is, or out of reach for now, is asked again for a while.

        Raises:
            CoordinatorLost: where its process has ended.
        """
        from ray.exceptions import ActorUnavailableError, GetTimeoutError

        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._get(getattr(self._coordinator, method).remote(*arguments), timeout=_CALL_S)
            except (GetTimeoutError, ActorUnavailableError):
                if time.monotonic() > until:
                    raise
                time.sleep(_ASK_S)
            except deaths():
                raise CoordinatorLost("the process that the workers agree by was killed or has ended") from None

    def _next_orders(self) -> dict[str, Any]:
        while (orders := self._call("orders", self.group, self.rank)) is None:
            time.sleep(_ASK_S)
        found: dict[str, Any] = orders
        return found

    def _beat(self, ended: str | None, sign: dict[str, Any] | None = None) -> dict[str, Any]:
        """Tell the coordinator how far this worker is; what has been saved goes on to Ray Train."""
        answer: dict[str, Any] = self._call("beat", self.group, self.rank, ended, sign, self.reporter.num_given)
        self.reporter.give(answer["saved"])
        return answer

    def _check(self, orders: dict[str, Any]) -> node_check.NodeReport:
        """Whether this node may train, in its own words."""
        plan_path, attempt = Path(orders["plan"]), orders["attempt"]
        problems: list[Problem] = []
        try:
            plan = LaunchPlan.load(plan_path)
        except OSError as error:
            what = "the run directory is not visible"
            remedy = "set run.root to a folder on storage that all nodes share"
            problem = Problem(what, where=self.node, value=f"{plan_path}: {error.strerror}", remedy=remedy)
            return node_check.NodeReport(self.node, "", {}, "", (), 0.0, (problem,))
        run = RunDir(Path(plan.run_dir))
        report = node_check.check_node(plan, run, attempt, num_ranks=orders["local_size"])
        problems += [replace(problem, where=self.node) for problem in report.problems]
        marker = run.attempt(attempt) / "marker"
        if not problems and (not marker.is_file() or marker.read_text() != orders["marker"]):
            what = "the run directory is not the one that the head node sees: a file of this start is not in it"
            remedy = "set run.root to a folder on storage that all nodes share"
            problems.append(Problem(what, where=self.node, value=str(run.root), remedy=remedy))
        if (unseen := _storage_problem(plan)) is not None:
            problems.append(replace(unseen, where=self.node))
        problems += unreachable(self.node, orders["others"], _REACH_S)
        return replace(report, host=self.node, problems=tuple(problems))

    def _train(self, orders: dict[str, Any]) -> str:
        """Start this worker's rank and stay with it to its end; returns how it ended: done or failed."""
        plan_path, attempt, number = orders["plan"], orders["attempt"], orders["rank"]
        plan = LaunchPlan.load(plan_path)
        run = RunDir(Path(plan.run_dir))
        started, stopped = time.time(), False
        stalls: list[str] = []
        folder = run.attempt(attempt) / "elastic"
        folder.mkdir(exist_ok=True)
        error_file = folder / f"rank-{number:05d}.json"
        table = heartbeat.HeartbeatTable(self.local_rank + 1)
        keys = {**os.environ, **orders["environment"], **RaySection.of(plan.config.cluster).env}
        mirror = MirrorProcess.start(plan, plan_path, run, attempt, keys) if number == 0 else None
        observer = Observer(table, self.local_rank, plan.config.cluster.stall_seconds)
        environment = self._rank_environment(plan, run, orders, error_file, table)
        while self.ranks.is_warming_up():
            # Where storage is slow imports take minutes, and a worker that says nothing counts as lost.
            self._beat(None)
            time.sleep(_ASK_S)
        # Blocked from its first instruction on: what comes while it imports waits until it listens.
        with _blocked_signals():
            rank = self.ranks.start(plan_path, attempt, environment)
        # Another attempt has other workers.
        self.ranks.close()
        sent: dict[str, float] = {}
        try:
            while rank.poll() is None:
                answer = self._beat(None, observer.sign(rank.pid))
                wish = answer["signal"]
                if answer["stacks"]:
                    rank.send_signal(signal.SIGQUIT)
                if answer["hung"] is not None and not stalls:
                    stalls.append(answer["hung"])
                    rank.kill()
                elif wish is not None:
                    stopped = stopped or wish != "TERM"
                    sent.setdefault(wish, time.monotonic())
                    late = wish == "TERM" and time.monotonic() - sent["TERM"] > _KILL_AFTER_S
                    rank.send_signal(signal.SIGKILL if late else signal.Signals[f"SIG{wish}"])
                with suppress(subprocess.TimeoutExpired):
                    rank.wait(_ASK_S)
        finally:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
            table.close()
        code = rank.returncode
        failure = None
        # A rank that is asked before it listens ends by the signal itself.
        asked = {-signal.Signals[f"SIG{wish}"] for wish in sent} | ({-signal.SIGKILL, DISMISSED} if "TERM" in sent else set())
        # One that hung was killed before that, however long it took to end.
        if code and (stalls or code not in asked):
            failure = failure_record.from_exit_code(run, attempt, number, code, error_file, stalls)
            final = failure_record.read_final(run, attempt)
            if final is not None and final.rank == number:
                failure = failure_record.from_final(run, attempt, final)
        record = NodeRecord(
            number,
            ended_at=time.time(),
            host=self.node,
            started_at=started,
            stopped=stopped,
            killed="KILL" in sent,
            first_failure=failure,
        )
        json_records.write(node_file(run, attempt, number), record)
        if failure is not None:
            # The others wait for this rank, and are not to wait for the mirror as well.
            self._beat("failed")
        if mirror is not None:
            # The last checkpoint takes the time that it needs, unless another attempt waits or a person has waited enough.
            until = time.time() + AFTER_FAILURE_S if failure or {"TERM", "USR2"} & sent.keys() else float("inf")
            mirror.finish(until, lambda: self._is_wanted_elsewhere(failure is not None))
        # States of a whole model would fill the disk of a node that the run does not come back to.
        with suppress(OSError):
            if plan.nvme_folder is not None and self.local_rank == 0 and run_store.newest_attempt(run) == attempt:
                shutil.rmtree(plan.nvme_folder, ignore_errors=True)
        return "failed" if failure is not None else "done"

    def _is_wanted_elsewhere(self, failed: bool) -> bool:
        """Whether the mirror is to be left as it is; where this worker's own rank has failed, all are told to end."""
        answer = self._beat(None)
        again = answer["verdict"] is not None and answer["verdict"]["again"]
        return again or answer["signal"] == "KILL" or (answer["signal"] == "TERM" and not failed)

    def _warm_up(self, plan: str, environment: Mapping[str, str]) -> None:
        """Have a fork server import what a rank of `plan` needs, while the workers come together and the nodes are checked."""
        try:
            planned = LaunchPlan.load(plan)
        except OSError:
            # The check tells that this node does not see it.
            return
        self.ranks = RankProcesses(Path(planned.run_dir))
        if planned.config.cluster.fork_ranks:
            with _blocked_signals():
                self.ranks.warm_up(plan, _node_environment(planned, environment))

    def _rank_environment(
        self, plan: LaunchPlan, run: RunDir, orders: dict[str, Any], error_file: Path, table: heartbeat.HeartbeatTable
    ) -> dict[str, str]:
        section = RaySection.of(plan.config.cluster)
        environment = {
            **_node_environment(plan, orders["environment"]),
            "RANK": str(orders["rank"]),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(orders["world_size"]),
            "LOCAL_WORLD_SIZE": str(orders["local_size"]),
            "MASTER_ADDR": orders["address"],
            "MASTER_PORT": str(orders["port"]),
            error_record.VARIABLE: str(error_file),
            heartbeat.VARIABLE: str(table.path),
        }
        if len(orders["peers"]) > 1:
            endpoint = network.own_endpoint(orders["peers"], section.interface)
            environment.setdefault("GLOO_SOCKET_IFNAME", endpoint.interface)
            # NCCL takes a bare name for a prefix.
            environment.setdefault("NCCL_SOCKET_IFNAME", f"={endpoint.interface}")
        return {**environment, **section.env}


def _node_environment(plan: LaunchPlan, entrusted: Mapping[str, str]) -> dict[str, str]:
    """The variables that are the same for all ranks of this node, those that the driver has entrusted to them among these."""
    cores = len(os.sched_getaffinity(0))
    return {
        **os.environ,
        **entrusted,
        # Ray sets the threads of an actor to the CPUs that it asked for, which are few or none.
        "OMP_NUM_THREADS": str(max(1, cores // plan.topology.ranks_per_node)),
        "PYTHONPATH": detached_process.build_pythonpath(RunDir(Path(plan.run_dir)).code, os.environ),
        "PYTHONSAFEPATH": "1",
        **RaySection.of(plan.config.cluster).env,
    }


def unreachable(node: str, others: Sequence[tuple[str, str, int]], most_s: float) -> list[Problem]:
    """Which of the `others`, each a node with the address and port that it listens at, do not answer to `node`.

    A node that reaches none is at fault itself; else those are that it does not reach.
    """
    until = time.monotonic() + most_s
    lost = [
        (name, address, port)
        for name, address, port in others
        if network.await_reachable(address, port, max(_LEAST_REACH_S, until - time.monotonic())) is None
    ]
    remedy = "open all ports between the nodes, or set cluster.interface to the network that joins them"
    if lost and len(lost) == len(others):
        listed = ", ".join(f"{name} at {address}:{port}" for name, address, port in lost)
        return [Problem(f"does not reach {listed}", where=node, remedy=remedy)]
    return [Problem(f"is not reached from {node} at {address}:{port}", where=name, remedy=remedy) for name, address, port in lost]


def _storage_problem(plan: LaunchPlan) -> Problem | None:
    """Whether this node sees what Ray Train has written to its storage; of a folder in the run directory that is known."""
    from ray import train

    storage_path = RaySection.of(plan.config.cluster).storage_path
    if storage_path is None:
        return None
    try:
        train.get_context().get_storage()._check_validation_file()
    except Exception as error:
        what = "Ray Train's storage is not the one that the head node sees"
        remedy = "set cluster.storage_path to a folder that all nodes share or to a URL, or take it out"
        return Problem(what, value=f"{storage_path}: {_words(error).splitlines()[0]}", remedy=remedy)
    return None
