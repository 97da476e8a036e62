"""Faults that a drill injects: the command that injects one on a node, and its report."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from launcher import json_records
from launcher.plan.run_dir import RunDir

# Seconds for the command on the node: to reach the node, find the run's processes, and act.
DEADLINE_S = 60.0


@dataclass(frozen=True)
class InjectedFault:
    """What was done, when (in seconds since the epoch), and on which host."""

    description: str
    at: float
    host: str


def command(run: RunDir, attempt: int, fault: str) -> list[str]:
    """Build the command that injects `fault` into the processes of an attempt on the node where it is started."""
    path = os.pathsep.join(filter(None, (str(run.code), os.environ.get("PYTHONPATH"))))
    module = [sys.executable, "-m", "launcher.worker.fault_injection", fault, str(run.root), str(attempt)]
    return ["env", f"PYTHONPATH={path}", "PYTHONSAFEPATH=1", *module]


def read_report(output: str) -> InjectedFault:
    """Read what the command printed; its last line is the report, as JSON."""
    return json_records.loads(InjectedFault, output.strip().splitlines()[-1].encode(), "the output of fault_injection")
