"""What is kept of an attempt's end: which rank failed first and why, and what became of the run."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.checkpoint import store
from launcher.errors import WOULD_REPEAT, CheckpointError, LauncherError, RunError
from launcher.plan.run_dir import RunDir
from launcher.run_store import Superseded
from launcher.tracking.glance import newest_step
from launcher.worker.signals import CANCEL, DISMISSED, PREEMPT

_TRACEBACK_LINES = 40
# What torch's elastic agent waits between TERM and KILL.
_ELASTIC_KILL_DELAY_S = 30
_EXPECTED = {kind.__name__ for kind in (*WOULD_REPEAT, CheckpointError, RunError, Superseded)}


def node_file(run: RunDir, attempt: int, node: int) -> Path:
    """The record that a node's agent leaves."""
    return run.attempt(attempt) / f"node-{node:05d}.json"


def of_ranks(error: Any, run: RunDir, attempt: int, stalls: Sequence[str] = ()) -> dict[str, Any]:
    """Who failed first, and why. A rank that a signal killed comes before those whose connection to it broke.

    `stalls` is what the watchdog has said of ranks that it killed.
    """
    earliest = min(failure.timestamp for failure in error.failures.values())

    def killed(failure: Any) -> bool:
        # After the first failure the agent itself kills the others, 30 s after its TERM.
        return _killed(failure) and failure.timestamp - earliest < _ELASTIC_KILL_DELAY_S / 2

    def order(item: tuple[int, Any]) -> tuple[bool, bool, float, int]:
        rank, failure = item
        return failure.exitcode == DISMISSED, not killed(failure), failure.timestamp, rank

    rank, failure = min(error.failures.items(), key=order)
    recorded = failure.error_file_data.get("message")
    return _of_rank(run, attempt, rank, failure.exitcode, failure.timestamp, failure.message, recorded, _killed(failure), stalls)


def of_exit(run: RunDir, attempt: int, rank: int, exit_code: int, error_file: Path, stalls: Sequence[str] = ()) -> dict[str, Any]:
    """The failure of one rank, from its exit code and what torch's `record` has left of its exception in `error_file`."""
    recorded = run_store.read_json(error_file).get("message") if error_file.is_file() else None
    killed = exit_code < 0 and -exit_code not in (signal.SIGTERM, signal.SIGINT) and recorded is None
    said = f"ended with exit code {exit_code}"
    return _of_rank(run, attempt, rank, exit_code, time.time(), said, recorded, killed, stalls)


def _of_rank(
    run: RunDir,
    attempt: int,
    rank: int,
    exit_code: int,
    at: float,
    message: str,
    recorded: Any,
    killed: bool,
    stalls: Sequence[str],
) -> dict[str, Any]:
    trace = ""
    if isinstance(recorded, dict):
        message, trace = recorded.get("message", ""), recorded.get("extraInfo", {}).get("py_callstack", "")
    kind, _, text = str(message).partition(": ")
    if kind in _EXPECTED:
        # Plain words say it all; the traceback stands in the rank's log.
        message, trace = text, ""
    if killed:
        kind, message = "killed", f"killed by {signal.Signals(-exit_code).name}"
        if -exit_code == signal.SIGKILL and stalls:
            message = stalls[-1]
    return {
        "rank": rank,
        "kind": kind,
        "at": at,
        "exit_code": exit_code,
        "message": str(message),
        "traceback": "\n".join(str(trace).splitlines()[-_TRACEBACK_LINES:]),
        "log": str(run.rank_log(attempt, rank)),
    }


def of_restart(elastic_folder: Path, stalls: Sequence[str]) -> str:
    """Why a node's ranks are started again, in words: what the watchdog has said, else the first exception of the last start."""
    if stalls:
        return stalls[-1]
    last = max(elastic_folder.glob("*/attempt_*"), key=lambda folder: int(folder.name.rpartition("_")[2]), default=elastic_folder)
    with suppress(OSError, LauncherError, KeyError, TypeError):
        first = min(last.glob("*/error.json"), key=lambda file: file.stat().st_mtime, default=None)
        if first is not None:
            line, *_ = str(run_store.read_json(first)["message"]["message"]).partition("\n")
            return f"local rank {first.parent.name}: {line}"
    return "a rank was killed; the agent's log says by which signal"


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


def _killed(failure: Any) -> bool:
    """True where a signal other than the agent's own TERM ended the rank."""
    return failure.exitcode < 0 and -failure.exitcode not in (signal.SIGTERM, signal.SIGINT) and failure.error_file == "<N/A>"


def outcome(run: RunDir, attempt: int, failure: dict[str, Any] | None, requested: bool, killed: bool) -> dict[str, Any]:
    """State, step and message of an attempt: the ranks' own word where they left one, else what can be told from outside."""
    file = run.attempt(attempt) / "outcome.json"
    if failure is None and file.is_file():
        return run_store.read_json(file)
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
