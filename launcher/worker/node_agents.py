"""One node's part in a multi-node attempt: meet the other agents, check the node, run its ranks, leave a record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import launcher
from launcher import json_records
from launcher.clusters import network
from launcher.clusters.check_results import failure
from launcher.config.sections.cluster import ManagedSection
from launcher.errors import Problem, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, FailureRecord, NodeRecord, node_file
from launcher.worker import failure_record
from launcher.worker.agent import NodeAgent
from launcher.worker.checks import node_check
from launcher.worker.limits import cause_of
from launcher.worker.ranks.rank_env import NodeInfo
from launcher.worker.sidecars.sidecar import Sidecar

# Nodes usually start within seconds of each other; a prologue, a container or a slow file system may take minutes.
_MEET_DEADLINE_S = 300.0


@dataclass(frozen=True)
class NodeResult:
    """How a node's ranks ended, or why they did not start. Only the head node has the `mirror` and `answers` processes."""

    failure: FailureRecord | None
    problems: tuple[Problem, ...]
    mirror: Sidecar | None
    answers: Sidecar | None

    @property
    def exit_code(self) -> int:
        return 0 if self.failure is None and not self.problems else 1


def run_node(
    agent: NodeAgent, record: Attempt, number: int, log: Path, job: str | None = None, why_ended: Callable[[], str] = str
) -> NodeResult:
    """Meet the agents of the other nodes, check node `number` and run its ranks to their end.

    `log` is the file with the agent's output; for `job` and `why_ended` see `NodeAgent.run_ranks`.
    """
    plan, run, attempt = agent.plan, agent.run, agent.attempt
    mirror: Sidecar | None = None
    answers: Sidecar | None = None
    failure: FailureRecord | None = None
    problems: list[Problem] = []
    try:
        node = node_info(plan, record, number)
        store = connect(record, node)
        problems = check(store, plan, run, attempt, record, node)
        if not problems and not agent.stopper.requested:
            if node.is_head:
                mirror = agent.start_mirror()
                answers = agent.start_answers()
            failure = agent.run_ranks(node, store, job, why_ended)
    except Exception as error:
        failure = failure_record.from_exception(error, log, limit=cause_of(error, run.root))
    return NodeResult(failure, tuple(problems), mirror, answers)


def write_record(agent: NodeAgent, number: int, host: str, result: NodeResult) -> None:
    """Write the record of node `number`; the attempt is concluded from these records."""
    record = NodeRecord(
        number,
        ended_at=time.time(),
        host=host,
        started_at=agent.started_at,
        stopped=agent.stopper.requested,
        killed=agent.stopper.killed,
        first_failure=result.failure,
        problems=result.problems,
    )
    json_records.write(node_file(agent.run, agent.attempt, number), record)


def node_info(plan: LaunchPlan, record: Attempt, node: int) -> NodeInfo:
    """Return this node's index, hosts and address; the agents meet at the head node's address.

    Raises:
        RunError: if other nodes can reach no interface of this node.
    """
    section = ManagedSection.of(plan.config.cluster)
    if record.address is None or record.port is None:
        raise RunError("the attempt has no address and port of the head node", where="attempt.json", remedy="resume the run")
    if node == 0:
        return NodeInfo(node, record.nodes, record.address, record.interface)
    endpoint = network.own_endpoint([record.address], section.interface)
    return NodeInfo(node, record.nodes, endpoint.address, endpoint.interface)


def connect(record: Attempt, here: NodeInfo) -> Any:
    """Return the head node's TCPStore, which all nodes share.

    Raises:
        RunError: if the head node is unreachable, or its port is taken.
    """
    from torch.distributed import DistNetworkError

    from launcher.distributed import open_store

    assert record.address is not None
    assert record.port is not None
    if not here.is_head and network.await_reachable(record.address, record.port, _MEET_DEADLINE_S) is None:
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


def check(store: Any, plan: LaunchPlan, run: RunDir, attempt: int, record: Attempt, here: NodeInfo) -> list[Problem]:
    """Return the problems of all nodes of the attempt, the same list on each node; empty if all are fit.

    Raises:
        RunError: if the connection to the head node is lost.
    """
    if not ManagedSection.of(plan.config.cluster).node_checks:
        return []
    report = node_check.check_node(plan, attempt)
    imported = Path(launcher.__file__).resolve()
    if not imported.is_relative_to(run.code.resolve()):
        seen = f"runs a different launcher from the one submitted: {imported.parent}"
        foreign = failure(seen, "unset PYTHONPATH in the container or in the environment of the node")
        report = replace(report, results=(*report.results, foreign))
    return node_check.exchange(store, report, record.nodes, here.node, _MEET_DEADLINE_S)
