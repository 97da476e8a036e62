"""The agents of an attempt's machines: their processes, and the files by which every machine judges which ones are alive.

Each machine refreshes a file in the run directory, and its command writes another if the agent ended without a record.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import atomic_files, json_records
from launcher.clusters import detached_process, network
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, Liveness, node_file
from launcher.tracking.metrics import format_duration

# Seconds without a sign of life after which a machine counts as lost, and the others end the attempt; tests shorten it.
LOST_S = float(os.environ.get("LAUNCHER_LOST_NODE_SECONDS", "180"))
# How often a machine refreshes its file: often enough for a loss to be noticed in time.
INTERVAL_S = min(10.0, LOST_S / 6)
_AGENT = "launcher.worker.static.agent"


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
                self._count(node, passed_s if passed_s <= 2 * INTERVAL_S else 0.0)
            return [
                _judge(self._run, self._attempt, node, name, self._silent_s.get(node))
                for node, name in enumerate(self._record.nodes)
            ]

    def _count(self, node: int, passed_s: float) -> None:
        try:
            status = alive_file(self._run, self._attempt, node).stat()
        except FileNotFoundError:
            return
        # Each heartbeat is another file that takes the name; looking at its content would cost the storage more.
        version = (status.st_ino, status.st_mtime_ns)
        is_changed = version != self._versions.get(node)
        self._versions[node] = version
        self._silent_s[node] = 0.0 if is_changed else self._silent_s[node] + passed_s


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
        states.append(_judge(run, attempt, node, name, silent_s))
    return states


def _judge(run: RunDir, attempt: int, node: int, name: str, silent_s: float | None) -> NodeState:
    if node_file(run, attempt, node).is_file():
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
        if code is None or lost.is_file() or node_file(self._run, self._attempt, self._node).is_file() or not folder.is_dir():
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
