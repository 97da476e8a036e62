"""The first failure of an attempt: which rank or node agent failed, how, and why."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import json_records
from launcher.error_record import ErrorRecord
from launcher.errors import WOULD_REPEAT, CheckpointError, LauncherError, RunError, Superseded, describe
from launcher.plan.run_dir import RunDir
from launcher.run_records import FailureRecord, FinalFailure, final_file
from launcher.worker.signals import DISMISSED

_TRACEBACK_LINES = 40
# What torch's elastic agent waits between TERM and KILL.
_ELASTIC_KILL_DELAY_S = 30
_EXPECTED = {kind.__name__ for kind in (*WOULD_REPEAT, CheckpointError, RunError, Superseded)}


@dataclass(frozen=True)
class RankExit:
    """How a failed rank ended; `at` is in seconds since the epoch, `error` is the record that it left, if any."""

    rank: int
    exit_code: int
    at: float
    error: ErrorRecord | None

    @property
    def is_killed(self) -> bool:
        """True where a signal other than the agent's own TERM ended the rank.

        A rank that left a record ended by its exception.
        """
        return self.exit_code < 0 and -self.exit_code not in (signal.SIGTERM, signal.SIGINT) and self.error is None

    @property
    def description(self) -> str:
        """Describe the end by the exit code alone."""
        if self.exit_code >= 0:
            return f"ended with exit code {self.exit_code} and left no record of an error"
        return f"killed by {_signal_name(-self.exit_code)}"


def from_rank_exits(exits: Sequence[RankExit], run: RunDir, attempt: int, stalls: Sequence[str] = ()) -> FailureRecord:
    """Return the first failure among the exits of a node's ranks.

    A rank that a signal killed precedes ranks that lost their connection to it. `stalls` are the watchdog's messages on the ranks
    that it killed.
    """
    earliest = min(end.at for end in exits)

    def order(end: RankExit) -> tuple[bool, bool, float, int]:
        # After the first failure the agent itself kills the others, 30 s after its TERM.
        killed = end.is_killed and end.at - earliest < _ELASTIC_KILL_DELAY_S / 2
        return end.exit_code == DISMISSED, not killed, end.at, end.rank

    return _from_exit(min(exits, key=order), run, attempt, stalls)


def from_exit_code(
    run: RunDir, attempt: int, rank: int, exit_code: int, error_file: Path, stalls: Sequence[str] = ()
) -> FailureRecord:
    """Return the failure of one rank from its exit code and from the error record that it left in `error_file`."""
    return _from_exit(RankExit(rank, exit_code, time.time(), ErrorRecord.read(error_file)), run, attempt, stalls)


def _from_exit(end: RankExit, run: RunDir, attempt: int, stalls: Sequence[str]) -> FailureRecord:
    kind, message, trace = "killed" if end.is_killed else "exit", end.description, ""
    if end.error is not None:
        message, trace = end.error.message, end.error.traceback
        kind, _, text = message.partition(": ")
        if kind in _EXPECTED:
            # The message says everything; the rank's log has the traceback.
            message, trace = text, ""
    elif end.exit_code == -signal.SIGKILL and stalls:
        message = stalls[-1]
    return FailureRecord(
        rank=end.rank,
        kind=kind,
        message=message,
        at=end.at,
        exit_code=end.exit_code,
        traceback="\n".join(trace.splitlines()[-_TRACEBACK_LINES:]),
        log=str(run.rank_log(attempt, end.rank)),
    )


def from_final(run: RunDir, attempt: int, final: FinalFailure) -> FailureRecord:
    """Return the failure that a rank recorded as one that a restart would repeat."""
    log = str(run.rank_log(attempt, final.rank))
    return FailureRecord(final.rank, final.kind, final.message, at=final.at, exit_code=1, log=log)


def from_exception(error: Exception, folder: Path, at: float | None = None) -> FailureRecord:
    """Return the failure of a node's agent, which no rank is to blame for; `folder` is the attempt's."""
    return FailureRecord(None, type(error).__name__, describe(error), at=at, log=str(folder / "agent.log"))


def describe_restart(exits: Sequence[RankExit], run: RunDir, attempt: int, stalls: Sequence[str]) -> str:
    """Say in one line why a node's ranks are restarted: the watchdog's message, or else the first failure."""
    if stalls:
        return stalls[-1]
    if not exits:
        return "torch's elastic agent reported no failed rank"
    first = from_rank_exits(exits, run, attempt)
    line, *_ = first.message.split("\n", 1)
    return f"{first.source}: {line}"


def read_final(run: RunDir, attempt: int) -> FinalFailure | None:
    """Return the recorded failure that a restart would repeat; None where there is none, or where it cannot be read."""
    try:
        return json_records.read(FinalFailure, final_file(run, attempt))
    except LauncherError:
        return None


def _signal_name(number: int) -> str:
    # Most real-time signals have no name.
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
