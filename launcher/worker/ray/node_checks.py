"""The checks that the nodes of a group run on themselves before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher import json_records
from launcher.clusters import network
from launcher.clusters.check_results import CheckResult, MachineReport, failure, with_differences
from launcher.errors import Problem
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import NodeRecord, node_file
from launcher.worker.checks import node_check
from launcher.worker.ray.messages import CheckNode

# Checks of GPUs and of a busy file system take seconds; without a deadline, a hung node would hold all others forever.
DEADLINE_S = 300.0
# Seconds to reach all other nodes together, and the minimum for each.
_REACH_S, _MIN_REACH_S = 30.0, 2.0
_SHARED_REMEDY = "set run.root to a folder on storage that all nodes share"


@dataclass
class Checks:
    """Reports, keyed by the group rank of the worker that checks its node, and the problems of all nodes."""

    reports: dict[int, MachineReport] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, rank: int, report: MachineReport, num_nodes: int) -> None:
        """Add a report; the last of `num_nodes` completes the problems of all nodes and their differences."""
        self.reports[rank] = report
        if len(self.reports) < num_nodes:
            return
        reports = [report for _, report in sorted(self.reports.items())]
        self.problems = [problem for report in reports for problem in report.problems]
        # A node without the run directory would differ in everything.
        fit = with_differences([report for report in reports if not report.problems])
        self.problems += [problem for report in fit for problem in report.problems]

    def add_missing(self, nodes: Sequence[str]) -> None:
        """Add a problem for each node that did not report in time."""
        what, remedy = f"the node did not report within {DEADLINE_S:g} s", "look at its storage and its GPUs"
        self.problems += [Problem(what, where=node, remedy=remedy) for node in nodes]

    def write(self, run: RunDir, attempt: int, nodes: Sequence[str]) -> None:
        """Write the problems into each rank's record; `nodes` is in rank order."""
        with suppress(OSError):
            for rank, node in enumerate(nodes):
                record = NodeRecord(rank, time.time(), host=node, problems=tuple(self.problems))
                json_records.write(node_file(run, attempt, rank), record)


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
    results = [*report.results]
    marker = run.attempt(attempt) / "marker"
    if not report.problems and (not marker.is_file() or marker.read_text() != assignment.marker):
        seen = f"the run directory differs from the head node's: it lacks a file of this attempt: {run.root}"
        results.append(failure(seen, _SHARED_REMEDY))
    return MachineReport(node, (*results, *unreachable(node, orders.others, _REACH_S)))


def unreachable(node: str, others: Sequence[tuple[str, str, int]], deadline_s: float) -> list[CheckResult]:
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
