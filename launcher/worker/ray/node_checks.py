"""What the nodes of a group find out about themselves before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launcher import json_records
from launcher.errors import Problem
from launcher.plan.run_dir import RunDir
from launcher.run_records import NodeRecord, node_file
from launcher.worker.checks import node_check
from launcher.worker.checks.node_check import NodeReport

# Checks of GPUs and of a busy file system take seconds; a node that hangs would hold all others for ever.
DEADLINE_S = 300.0


@dataclass
class Checks:
    """Reports by the rank, in its group, of the worker that checks its node; the problems of all nodes."""

    reports: dict[int, NodeReport] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def take(self, rank: int, report: Mapping[str, Any], num_nodes: int) -> None:
        """Keep a report; the last of all nodes' tells what is wrong with any of them, and how they differ."""
        self.reports[rank] = NodeReport.from_json(report)
        if len(self.reports) < num_nodes:
            return
        reports = [self.reports[reported] for reported in sorted(self.reports)]
        self.problems = [problem for report in reports for problem in report.problems]
        # A node that lacks the run directory would differ in everything.
        sound = [report for report in reports if not report.problems]
        self.problems += [problem for report in sound for problem in node_check.differences(report, sound[0])]

    def give_up(self, nodes: Sequence[str]) -> None:
        """These have not reported in time."""
        what, remedy = f"the node did not report within {DEADLINE_S:g} s", "look at its storage and its GPUs"
        self.problems += [Problem(what, where=node, remedy=remedy) for node in nodes]

    def write(self, run: RunDir, attempt: int, nodes: Sequence[str]) -> None:
        """Say why nothing was loaded, in the record of each worker's rank; `nodes` by rank."""
        with suppress(OSError):
            for rank, node in enumerate(nodes):
                record = NodeRecord(rank, time.time(), host=node, problems=tuple(self.problems))
                json_records.write(node_file(run, attempt, rank), record)
