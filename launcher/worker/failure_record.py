"""What is kept of an attempt's end: which rank failed first and why, and what became of the run."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import json_records, run_store
from launcher.checkpoint import store
from launcher.error_record import ErrorRecord
from launcher.errors import WOULD_REPEAT, CheckpointError, LauncherError, RunError, Superseded
from launcher.plan.run_dir import RunDir
from launcher.tracking.metrics_tail import newest_step
from launcher.worker.signals import CANCEL, DISMISSED, PREEMPT

_TRACEBACK_LINES = 40
# What torch's elastic agent waits between TERM and KILL.
_ELASTIC_KILL_DELAY_S = 30
_EXPECTED = {kind.__name__ for kind in (*WOULD_REPEAT, CheckpointError, RunError, Superseded)}


def node_file(run: RunDir, attempt: int, node: int) -> Path:
    """The record that a node's agent leaves."""
    return run.attempt(attempt) / f"node-{node:05d}.json"


@dataclass(frozen=True)
class RankExit:
    """How a rank ended that has failed; `at` is in seconds since the epoch, `error` the record that it left."""

    rank: int
    exit_code: int
    at: float
    error: ErrorRecord | None

    @property
    def is_killed(self) -> bool:
        """True where a signal other than the agent's own TERM ended the rank; one that left a record ended by its exception."""
        return self.exit_code < 0 and -self.exit_code not in (signal.SIGTERM, signal.SIGINT) and self.error is None

    @property
    def description(self) -> str:
        """What the exit code alone tells."""
        if self.exit_code >= 0:
            return f"ended with exit code {self.exit_code} and left no record of an error"
        return f"killed by {_signal_name(-self.exit_code)}"


def of_ranks(exits: Sequence[RankExit], run: RunDir, attempt: int, stalls: Sequence[str] = ()) -> dict[str, Any]:
    """Who failed first, and why. A rank that a signal killed comes before those whose connection to it broke.

    `stalls` is what the watchdog has said of ranks that it killed.
    """
    earliest = min(end.at for end in exits)

    def order(end: RankExit) -> tuple[bool, bool, float, int]:
        # After the first failure the agent itself kills the others, 30 s after its TERM.
        killed = end.is_killed and end.at - earliest < _ELASTIC_KILL_DELAY_S / 2
        return end.exit_code == DISMISSED, not killed, end.at, end.rank

    return _of_rank(min(exits, key=order), run, attempt, stalls)


def of_exit(run: RunDir, attempt: int, rank: int, exit_code: int, error_file: Path, stalls: Sequence[str] = ()) -> dict[str, Any]:
    """The failure of one rank, from its exit code and the record that it has left of its exception in `error_file`."""
    return _of_rank(RankExit(rank, exit_code, time.time(), ErrorRecord.read(error_file)), run, attempt, stalls)


def _of_rank(end: RankExit, run: RunDir, attempt: int, stalls: Sequence[str]) -> dict[str, Any]:
    kind, message, trace = "killed" if end.is_killed else "exit", end.description, ""
    if end.error is not None:
        message, trace = end.error.message, end.error.traceback
        kind, _, text = message.partition(": ")
        if kind in _EXPECTED:
            # Plain words say it all; the traceback stands in the rank's log.
            message, trace = text, ""
    elif end.exit_code == -signal.SIGKILL and stalls:
        message = stalls[-1]
    return {
        "rank": end.rank,
        "kind": kind,
        "at": end.at,
        "exit_code": end.exit_code,
        "message": message,
        "traceback": "\n".join(trace.splitlines()[-_TRACEBACK_LINES:]),
        "log": str(run.rank_log(attempt, end.rank)),
    }


def of_restart(exits: Sequence[RankExit], run: RunDir, attempt: int, stalls: Sequence[str]) -> str:
    """Why a node's ranks are started again, in one line: what the watchdog has said, else who failed first."""
    if stalls:
        return stalls[-1]
    if not exits:
        return "torch's elastic agent reported no failed rank"
    first = of_ranks(exits, run, attempt)
    line, *_ = first["message"].split("\n", 1)
    return f"rank {first['rank']}: {line}"


def read_final(run: RunDir, attempt: int) -> dict[str, Any] | None:
    """What a rank has left of a failure that would repeat itself; None where that cannot be read."""
    try:
        final = json_records.read_json(run.attempt(attempt) / "final.json")
    except LauncherError:
        return None
    types = {"rank": int, "kind": str, "message": str, "at": float | int}
    return final if all(isinstance(final.get(key), kind) for key, kind in types.items()) else None


def of_final(run: RunDir, attempt: int, said: dict[str, Any]) -> dict[str, Any]:
    """A failure that would repeat itself, in the words that the rank left."""
    return {**said, "exit_code": 1, "traceback": "", "log": str(run.rank_log(attempt, said["rank"]))}


def of_agent(error: Exception, folder: Path) -> dict[str, Any]:
    """A failure that no rank is to blame for."""
    return {
        "rank": None,
        "kind": type(error).__name__,
        "at": None,
        "exit_code": None,
        "message": error.problems[0].what if isinstance(error, LauncherError) else f"{type(error).__name__}: {error}",
        "traceback": "",
        "log": str(folder / "agent.log"),
    }


def _signal_name(number: int) -> str:
    # Most real-time signals have no name.
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def outcome(run: RunDir, attempt: int, failure: dict[str, Any] | None, requested: bool, killed: bool) -> dict[str, Any]:
    """State, step and message of an attempt: the ranks' own word where they left one, else what can be told from outside."""
    file = run.attempt(attempt) / "outcome.json"
    if failure is None and file.is_file():
        return json_records.read_json(file)
    step = newest_step(run, run_store.read_status(run))
    saved = store.list_checkpoints(run.checkpoints)
    kept = f"the newest checkpoint is of step {saved[-1].step}" if saved else "there is no checkpoint"
    if killed:
        return {"state": "cancelled", "step": step, "message": f"killed at step {step} without saving; {kept}"}
    stopped_early = failure is None or failure["exit_code"] in (-CANCEL, -PREEMPT)
    if requested and stopped_early:
        return {"state": "cancelled", "step": step, "message": f"stopped before training had begun; {kept}"}
    if failure is None:
        return {"state": "failed", "step": step, "message": "the ranks ended without an outcome"}
    who = "the node's agent" if failure["rank"] is None else f"rank {failure['rank']}"
    return {"state": "failed", "step": step, "message": f"{who}: {failure['message']}"}
