"""The backend for machines that all run the same command. Each command starts its own machine's agent.

`train` and `resume` are in launcher.cli.every_node. Methods that need no meeting work on any machine that sees the run.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import clock
from launcher.clusters import detached_process, local, network
from launcher.clusters.backends import Cluster
from launcher.clusters.static_meeting import Meeting
from launcher.errors import SubmitError, describe_exit
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.runs.journal import NodeLost

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan

# The agent of a machine, which ends with that machine's command. Ctrl-C reaches only the command, which decides what it means.
AGENT = "launcher.worker.static"
REPEAT = "repeat the command on every machine to continue"
_END_DEADLINE_S = 60.0
_LOOK_S = 0.2


class StaticCluster(Cluster):
    """Machines that all run the same command; see `Cluster`. `agent` is the process that this command started."""

    drill_remedy = "start a short run, and kill the command on one machine, or send it TERM"

    def __init__(self, meeting: Meeting | None = None) -> None:
        self._meeting = meeting
        self.agent: subprocess.Popen[bytes] | None = None

    def check(self, plan: LaunchPlan) -> None:
        """Reject what this machine cannot run, since the others are like it; with a meeting, wait for the other machines."""
        from launcher.hardware import device

        local.require_gpus(plan, device())
        if self._meeting is not None:
            self._meeting.await_everyone()

    def preview(self, plan: LaunchPlan) -> str | None:
        count = plan.topology.nodes
        return f"machines   {count}, each of which runs this command with an index of its own (NODE_RANK)\n"

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        """Wait for the other machines, name the attempt's nodes, and start this machine's agent."""
        meeting = self._meeting
        if meeting is None:
            remedy = "run the command on every machine, with NODE_RANK set"
            raise SubmitError("a run of cluster=static is started by its own machines", where=str(run.root), remedy=remedy)
        endpoint, names = meeting.endpoint or network.LOOPBACK, meeting.await_everyone()
        begun = run_store.read_attempt(run, attempt)
        record = replace(begun, nodes=names, begun_at=clock.now(), **endpoint.choose_meeting())
        run_store.write_attempt(run, attempt, record)
        arguments, variables = [str(plan_path), str(attempt), "0"], {network.NODE_NAME_VARIABLE: names[0]}
        log, name = agent_log(run, attempt, 0), f"the agent of {names[0]}"
        self.agent = detached_process.start(run, attempt, AGENT, arguments, log, name, variables)
        meeting.begin(attempt, lambda node, reason: report_loss(run, attempt, node, f"{names[node]} was lost: {reason}"))

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        return [("machines", ", ".join(run_store.read_attempt(run, attempt).nodes))]

    def explain_lost(self, run: RunDir) -> str:
        attempt = run_store.newest_attempt(run)
        if self.agent is not None:
            report_killed_agent(run, attempt, 0, run_store.read_attempt(run, attempt).nodes[0], self.agent)
        reason = journal.read_state(run, attempt).lost.get(0, "the agent of node 0 ended without recording a result")
        return f"{reason}; {REPEAT}{run_store.describe_storage_problem(run)}"

    def await_end(self, run: RunDir) -> None:
        if self.agent is not None:
            await_agent(self.agent)

    def cancel(self, run: RunDir, save: bool = True) -> None:
        """Write the request that every agent watches for; a second request, or one without `save`, kills the ranks."""
        detached_process.request_cancel(run, self.status(run), save)


def agent_log(run: RunDir, attempt: int, node: int) -> Path:
    """Return the log of a machine's agent; node 0's log has the name that all backends use."""
    return run.agent_log(attempt) if node == 0 else run.attempt(attempt) / f"agent-{node:05d}.log"


def report_loss(run: RunDir, attempt: int, node: int, text: str) -> None:
    """Tell the agents of all machines that one is lost; only the first reason counts."""
    while True:
        # Storage may fail for a while.
        with suppress(OSError):
            return journal.append(run, attempt, NodeLost(node=node, text=text))
        time.sleep(_LOOK_S)


def report_killed_agent(run: RunDir, attempt: int, node: int, name: str, agent: subprocess.Popen[bytes]) -> None:
    """Report the loss of machine `node` if its agent has ended and left no record."""
    if (code := agent.poll()) is None:
        return
    state = journal.read_state(run, attempt)
    if node not in state.nodes and node not in state.lost:
        report_loss(run, attempt, node, f"the agent of {name} {describe_exit(code)} and left no record")


def await_agent(agent: subprocess.Popen[bytes]) -> None:
    """Wait for an agent whose attempt has ended; kill it if that takes too long."""
    try:
        agent.wait(_END_DEADLINE_S)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.wait()
