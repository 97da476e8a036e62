"""Heartbeats of an attempt's machines: a file that each machine refreshes, and a record if its agent ended without one.

All machines write to the run directory, so every machine, and any command elsewhere, judges by the same files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import atomic_files, json_records
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, Liveness, node_file
from launcher.tracking.metrics import format_duration

# How often a machine refreshes its file: often enough for a loss to be noticed in time.
_LONGEST_INTERVAL_S, _REFRESHES = 10.0, 6.0


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


def interval_s(lost_node_s: float) -> float:
    return min(_LONGEST_INTERVAL_S, lost_node_s / _REFRESHES)


def write_alive(run: RunDir, attempt: int, node: int, name: str) -> None:
    json_records.write(alive_file(run, attempt, node), Liveness(time.time(), name))


def write_lost(run: RunDir, attempt: int, node: int, message: str) -> None:
    json_records.write(lost_file(run, attempt, node), LostNode(node, message, time.time()))


class HeartbeatWatch:
    """Watches the machines of an attempt over time, for decisions that end ranks; any thread may look.

    Silence counts from the last change of a machine's file, on this process's own clock: some network file systems store the
    time of the machine that wrote a file. It counts only while this process can look at least every two intervals. During an
    outage of the storage, or while this machine is suspended, the other machines cannot write either.
    """

    def __init__(self, run: RunDir, attempt: int, record: Attempt, lost_node_s: float) -> None:
        self._run, self._attempt, self._record, self._lost_node_s = run, attempt, record, lost_node_s
        self._longest_gap_s = 2 * interval_s(lost_node_s)
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
                self._count(node, passed_s if passed_s <= self._longest_gap_s else 0.0)
            return [
                _judge(self._run, self._attempt, node, name, self._silent_s.get(node), self._lost_node_s)
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


def read_states(run: RunDir, attempt: int, record: Attempt, lost_node_s: float) -> list[NodeState]:
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
        states.append(_judge(run, attempt, node, name, silent_s, lost_node_s))
    return states


def _judge(run: RunDir, attempt: int, node: int, name: str, silent_s: float | None, lost_node_s: float) -> NodeState:
    if node_file(run, attempt, node).is_file():
        return NodeState(name, silent_s, True)
    with suppress(LauncherError):
        if (lost := json_records.read_if_present(LostNode, lost_file(run, attempt, node))) is not None:
            return NodeState(name, silent_s, False, lost.message)
    if silent_s is not None and silent_s > lost_node_s:
        return NodeState(name, silent_s, False, f"{name} was lost: no sign of life for {format_duration(silent_s)}")
    return NodeState(name, silent_s, False)


def describe_silence(states: Iterable[NodeState]) -> dict[str, str]:
    """Return why machines left no record, keyed by name, for the postmortem of an ended attempt."""
    return {
        state.name: state.lost or f"{state.name} left no record: its agent was killed, or the machine was lost"
        for state in states
        if not state.ended
    }
