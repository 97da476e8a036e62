"""The backend for machines that all run the same command. Each command starts its own machine's agent.

`train` and `resume` are in launcher.cli.every_node. Methods that need no meeting work on any machine that sees the run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import atomic_files, json_records, run_store
from launcher.clusters import detached_process, local, network
from launcher.clusters.backends import Cluster, InjectedFault, mark_never_submitted
from launcher.errors import LauncherError, SubmitError
from launcher.hardware import device
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Attempt, Liveness, Status
from launcher.runs.journal import read_node
from launcher.tracking.metrics import format_duration

if TYPE_CHECKING:
    from launcher.clusters.static_meeting import Meeting
    from launcher.config.sections.cluster import ClusterSection
    from launcher.plan.launch_plan import DeviceFacts, LaunchPlan

REPEAT = "repeat the command on every machine to continue"
_END_DEADLINE_S = 60.0
# Seconds from an attempt's start to its agents' first heartbeats.
_START_S = 120.0
# Seconds without a sign of life after which a machine counts as lost, and the others end the attempt; tests shorten it.
LOST_S = float(os.environ.get("LAUNCHER_LOST_NODE_SECONDS", "180"))
# How often a machine refreshes its file: often enough for a loss to be noticed in time.
INTERVAL_S = min(10.0, LOST_S / 6)
_AGENT = "launcher.worker.static"


class StaticCluster(Cluster):
    """Machines that all run the same command; see `Cluster`. `process` is the agent that this command started."""

    status_interval_s = 1.0
    drill_remedy: str | None = "start a short run, and kill the command on one machine, or send it TERM"

    def __init__(self, meeting: Meeting | None = None) -> None:
        self._meeting = meeting
        self.process: NodeProcess | None = None

    def device(self, section: ClusterSection) -> DeviceFacts:
        return device()

    def check(self, plan: LaunchPlan) -> None:
        """Reject what this machine cannot run, since the others are like it; with a meeting, wait for the other machines.

        Raises:
            SubmitError, ConfigError: also for machines that are missing or were started differently.
        """
        local.require_gpus(plan, device())
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
        self.process = NodeProcess(run, attempt, plan_path, 0, names[0])
        if not detached_process.await_status(run, attempt, self.process.poll):
            message = f"the agent of {names[0]} did not start"
            run_store.update_status(run, state="failed", attempt=attempt, message=message)
            raise SubmitError(message, where=str(agent_log(run, attempt, 0)), remedy="read its end there")

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        return [("machines", ", ".join(run_store.read_attempt(run, attempt).nodes))]

    def status(self, run: RunDir) -> Status:
        status = run_store.read_status(run)
        if status.state not in RUNNING_STATES:
            return status
        number = run_store.newest_attempt(run)
        record = run_store.read_attempt(run, number) if number else None
        if record is None or not record.nodes:
            return mark_never_submitted(status, _START_S)
        states = read_states(run, number, record)
        if self.process is not None and self.process.poll() is None:
            return _add_node_states(status, states)
        # The record may have been written after the status was read.
        latest = run_store.read_status(run)
        if latest.state not in RUNNING_STATES:
            return latest
        head = states[0]
        never = head.silent_s is None and time.time() - (record.begun_at or 0.0) > _START_S
        # The agent continues after its record, until the attempt is concluded and mirrored.
        gone = head.ended and (self.process is not None or head.silent_s is None or head.silent_s > LOST_S)
        if head.lost or never or gone:
            reason = head.lost or (f"the agent of {head.name} has ended without recording a result" if head.ended else "")
            others = [state.lost for state in states[1:] if state.lost]
            message = "; ".join([reason or f"the agent of {head.name} never started", *others, REPEAT])
            return replace(latest, state="failed", message=message + run_store.describe_storage_problem(run))
        return _add_node_states(latest, states)

    def await_end(self, run: RunDir) -> None:
        if self.process is not None:
            self.process.wait(_END_DEADLINE_S)

    def cancel(self, run: RunDir, save: bool = True) -> None:
        """Write the request that every agent watches for; a second request, or one without `save`, kills the ranks."""
        detached_process.request_cancel(run, self.status(run), save)

    def inject_fault(self, run: RunDir, attempt: int, fault: str) -> InjectedFault:
        raise NotImplementedError


def is_idle(run: RunDir) -> bool:
    """Return whether no machine writes to the newest attempt any more."""
    number = run_store.newest_attempt(run)
    if not number:
        return True
    record = run_store.read_attempt(run, number)
    return not any(state.is_alive for state in read_states(run, number, record))


def _add_node_states(status: Status, states: list[NodeState]) -> Status:
    if len(states) == 1:
        return status
    silent = [state for state in states if state.lost or state.silent_s is None]
    note = "; ".join(state.description for state in (silent or states))
    return replace(status, message="; ".join(filter(None, (status.message, note))))


@dataclass(frozen=True)
class LostNode:
    """lost-NNNNN.json: how an agent that left no record ended; written by the command that started it."""

    node: int
    message: str
    at: float


@dataclass(frozen=True)
class NodeState:
    """One machine of an attempt: its `name`, the seconds since its last heartbeat (None before the first), and how it ended.

    `ended` means that it left its record; `lost` is why it counts as lost, or empty.
    """

    name: str
    silent_s: float | None
    ended: bool
    lost: str = ""

    @property
    def is_alive(self) -> bool:
        """True if its agent may still write."""
        return not self.ended and not self.lost and self.silent_s is not None

    @property
    def description(self) -> str:
        if self.lost or self.ended:
            return self.lost or f"{self.name} has ended"
        if self.silent_s is None:
            return f"{self.name} has not started yet"
        return f"{self.name} alive {format_duration(self.silent_s)} ago"


def alive_file(run: RunDir, attempt: int, node: int) -> Path:
    return run.attempt(attempt) / f"alive-{node:05d}.json"


def lost_file(run: RunDir, attempt: int, node: int) -> Path:
    return run.attempt(attempt) / f"lost-{node:05d}.json"


def agent_log(run: RunDir, attempt: int, node: int) -> Path:
    """Return the log of a machine's agent; node 0's log has the name that all backends use."""
    return run.agent_log(attempt) if node == 0 else run.attempt(attempt) / f"agent-{node:05d}.log"


def write_alive(run: RunDir, attempt: int, node: int, name: str) -> None:
    json_records.write(alive_file(run, attempt, node), Liveness(time.time(), name))


class HeartbeatWatch:
    """Watches the machines of an attempt over time, for decisions that end ranks; any thread may look.

    Silence counts from the last change of a machine's file, on this process's own clock: some network file systems store the
    time of the machine that wrote a file. It counts only while this process can look at least every two intervals. During an
    outage of the storage, or while this machine is suspended, the other machines cannot write either.
    """

    def __init__(self, run: RunDir, attempt: int, record: Attempt) -> None:
        self._run, self._attempt, self._record = run, attempt, record
        self._versions: dict[int, tuple[int, int]] = {}
        self._silent_s: dict[int, float] = {}
        self._looked_at = time.monotonic()
        self._lock = threading.Lock()

    def look(self) -> list[NodeState]:
        """Return the state of every machine, in order.

        Raises:
            OSError: if the storage does not answer.
        """
        with self._lock:
            began = time.monotonic()
            passed_s, self._looked_at = began - self._looked_at, began
            atomic_files.refresh_directory(self._run.attempt(self._attempt))
            for node in range(len(self._record.nodes)):
                with suppress(FileNotFoundError):
                    status = alive_file(self._run, self._attempt, node).stat()
                    # Each heartbeat is another file that takes the name; looking at its content would cost the storage more.
                    version = (status.st_ino, status.st_mtime_ns)
                    counted_s = passed_s if passed_s <= 2 * INTERVAL_S else 0.0
                    is_changed = version != self._versions.get(node)
                    self._versions[node] = version
                    self._silent_s[node] = 0.0 if is_changed else self._silent_s[node] + counted_s
            return [
                _judge_node(self._run, self._attempt, node, name, self._silent_s.get(node))
                for node, name in enumerate(self._record.nodes)
            ]


def read_states(run: RunDir, attempt: int, record: Attempt) -> list[NodeState]:
    """Return the state of every machine of an attempt at a glance, in order.

    Times come from the file system, because machine clocks differ.
    """
    now = time.time()
    with suppress(OSError):
        now = atomic_files.refresh_directory(run.attempt(attempt))
    states = []
    for node, name in enumerate(record.nodes):
        silent_s: float | None = None
        with suppress(OSError):
            silent_s = max(0.0, now - alive_file(run, attempt, node).stat().st_mtime)
        states.append(_judge_node(run, attempt, node, name, silent_s))
    return states


def _judge_node(run: RunDir, attempt: int, node: int, name: str, silent_s: float | None) -> NodeState:
    if read_node(run, attempt, node) is not None:
        return NodeState(name, silent_s, True)
    with suppress(LauncherError):
        if (lost := json_records.read_if_present(LostNode, lost_file(run, attempt, node))) is not None:
            return NodeState(name, silent_s, False, lost.message)
    if silent_s is not None and silent_s > LOST_S:
        return NodeState(name, silent_s, False, f"{name} was lost: no sign of life for {format_duration(silent_s)}")
    return NodeState(name, silent_s, False)


def describe_silence(states: Iterable[NodeState]) -> dict[str, str]:
    """Return why machines left no record, keyed by name, for the postmortem of an ended attempt."""
    return {
        state.name: state.lost or f"{state.name} left no record: its agent was killed, or the machine was lost"
        for state in states
        if not state.ended
    }


class NodeProcess:
    """The agent of machine `node`, which ends with this process; that machine's command starts and watches it."""

    def __init__(self, run: RunDir, attempt: int, plan_path: Path, node: int, name: str) -> None:
        """Start the agent from the run's code; its output goes to its log in the attempt's folder."""
        self._run, self._attempt, self._node, self._name = run, attempt, node, name
        arguments = [str(plan_path), str(attempt), str(node)]
        variables = {network.NODE_NAME_VARIABLE: name}
        # Ctrl-C reaches only this process, which decides what it means.
        self._process = detached_process.start_module(run, _AGENT, arguments, agent_log(run, attempt, node), variables)

    def poll(self) -> int | None:
        """Return the exit code, None while the agent runs. If it left no record, record its end for the other machines."""
        code = self._process.poll()
        lost, folder = lost_file(self._run, self._attempt, self._node), self._run.attempt(self._attempt)
        if code is None or lost.is_file() or not folder.is_dir() or read_node(self._run, self._attempt, self._node) is not None:
            return code
        names = {-number: number.name for number in signal.Signals}
        how = f"was killed by {names[code]}" if code in names else f"ended with exit code {code} and left no record"
        with suppress(OSError):
            json_records.write(lost, LostNode(self._node, f"the agent of {self._name} {how}", time.time()))
        return code

    def wait(self, deadline_s: float) -> None:
        """Wait for the agent to end; kill it after `deadline_s` seconds."""
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal; do nothing if the agent has ended."""
        self._process.send_signal(number)
