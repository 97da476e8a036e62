"""The backend for machines that all run the same command. Each command starts its own machine's agent.

`train` and `resume` are in launcher.cli.starting.every_node. Methods that need no meeting work on any machine that sees the run.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import json_records, run_records, run_store
from launcher.clusters import detached_process, network
from launcher.clusters.backends import NEVER_SUBMITTED
from launcher.clusters.faults import InjectedFault
from launcher.clusters.static import nodes
from launcher.errors import SubmitError
from launcher.hardware import device
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, CancelRequest, Status

if TYPE_CHECKING:
    from launcher.clusters.static.meeting import Meeting
    from launcher.config.sections.cluster import ClusterSection
    from launcher.plan.launch_plan import DeviceFacts, LaunchPlan

REPEAT = "repeat the command on every machine to continue"
_END_DEADLINE_S = 60.0
# Seconds from an attempt's start to its agents' first heartbeats.
_START_S = 120.0


class StaticCluster:
    """Machines that all run the same command; see `Cluster`. `process` is the agent that this command started."""

    status_interval_s = 1.0
    drill_remedy: str | None = "start a short run, and kill the command on one machine, or send it TERM"

    def __init__(self, meeting: Meeting | None = None) -> None:
        self._meeting = meeting
        self.process: nodes.NodeProcess | None = None

    def device(self, section: ClusterSection) -> DeviceFacts:
        return device()

    def check(self, plan: LaunchPlan) -> None:
        """Reject what this machine cannot run, since the others are like it; with a meeting, wait for the other machines.

        Raises:
            SubmitError, ConfigError: also for machines that are missing or were started differently.
        """
        here = device()
        num_gpus = here.count if here.kind == "cuda" else 0
        if plan.topology.device == "cuda" and plan.topology.ranks_per_node > num_gpus:
            message, value = f"this machine has {num_gpus or 'no'} GPUs", str(plan.topology.ranks_per_node)
            raise SubmitError(message, where="cluster.ranks_per_node", value=value)
        if self._meeting is not None:
            self._meeting.await_everyone()

    def preview(self, plan: LaunchPlan) -> str | None:
        count = plan.topology.nodes
        return f"machines   {count}, each of which runs this command with an index of its own (NODE_RANK)\n"

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        """Wait for the other machines, name the attempt's nodes, and start this machine's agent.

        Raises:
            SubmitError: if it is not called by its own machine's command, for example for a run that another user's command would
            start.
        """
        meeting = self._meeting
        if meeting is None:
            remedy = "run the command on every machine, with NODE_RANK set"
            raise SubmitError("a run of cluster=static is started by its own machines", where=str(run.root), remedy=remedy)
        endpoint = meeting.endpoint or network.LOOPBACK
        names = meeting.names()
        record = replace(
            run_store.read_attempt(run, attempt),
            nodes=names,
            address=endpoint.address,
            interface=endpoint.interface,
            port=network.free_port(endpoint.address),
            begun_at=time.time(),
        )
        run_store.write_attempt(run, attempt, record)
        meeting.announce(attempt, plan_path.parent != run.root, names)
        self.process = nodes.NodeProcess(run, attempt, plan_path, 0, names[0])
        deadline = time.monotonic() + detached_process.START_DEADLINE_S
        while run_store.read_status(run).attempt != attempt:
            if self.process.poll() is not None or time.monotonic() > deadline:
                message = f"the agent of {names[0]} did not start"
                run_store.update_status(run, state="failed", attempt=attempt, message=message)
                raise SubmitError(message, where=str(nodes.agent_log(run, attempt, 0)), remedy="read its end there")
            time.sleep(0.02)

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        return [("machines", ", ".join(run_store.read_attempt(run, attempt).nodes))]

    def status(self, run: RunDir) -> Status:
        status = run_store.read_status(run)
        if status.state not in RUNNING_STATES:
            return status
        number = run_store.newest_attempt(run)
        record = run_store.read_attempt(run, number) if number else None
        if record is None or not record.nodes:
            late = time.time() - status.updated_at > _START_S
            return replace(status, state="failed", message=NEVER_SUBMITTED) if late else status
        states = nodes.read_states(run, number, record)
        if self.process is not None and self.process.poll() is None:
            return _with_nodes(status, states)
        # The record may have been written after the status was read.
        latest = run_store.read_status(run)
        if latest.state not in RUNNING_STATES:
            return latest
        head = states[0]
        never = head.silent_s is None and time.time() - (record.begun_at or 0.0) > _START_S
        # The agent continues after its record, until the attempt is concluded and mirrored.
        gone = head.ended and (self.process is not None or head.silent_s is None or head.silent_s > nodes.LOST_S)
        if head.lost or never or gone:
            reason = head.lost or (f"the agent of {head.name} has ended without recording a result" if head.ended else "")
            others = [state.lost for state in states[1:] if state.lost]
            message = "; ".join([reason or f"the agent of {head.name} never started", *others, REPEAT])
            return replace(latest, state="failed", message=message + run_store.describe_storage_problem(run))
        return _with_nodes(latest, states)

    def await_end(self, run: RunDir) -> None:
        if self.process is not None:
            self.process.wait(_END_DEADLINE_S)

    def cancel(self, run: RunDir, save: bool = True) -> None:
        """Write the request that every agent watches for; a second request, or one without `save`, kills the ranks."""
        status = self.status(run)
        if status.state not in RUNNING_STATES:
            raise detached_process.not_running_error(run, status)
        number = run_store.newest_attempt(run)
        previous = run_records.read_cancel(run, number)
        json_records.write(run.cancel(number), CancelRequest(time.time(), save and previous is None))

    def inject_fault(self, run: RunDir, attempt: int, fault: str) -> InjectedFault:
        raise NotImplementedError


def is_idle(run: RunDir) -> bool:
    """Return whether no machine writes to the newest attempt any more."""
    number = run_store.newest_attempt(run)
    if not number:
        return True
    record = run_store.read_attempt(run, number)
    return not any(state.is_alive for state in nodes.read_states(run, number, record))


def _with_nodes(status: Status, states: list[nodes.NodeState]) -> Status:
    if len(states) == 1:
        return status
    silent = [state for state in states if state.lost or state.silent_s is None]
    note = "; ".join(state.description for state in (silent or states))
    return replace(status, message="; ".join(filter(None, (status.message, note))))
