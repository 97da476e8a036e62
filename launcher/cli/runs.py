"""The verbs that act on an existing run: logs, cancel, resume."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import run_records, run_store
from launcher.cli.follow import StatusWatch, follow, interrupted_start
from launcher.cli.interaction import Interrupts
from launcher.cli.resume import resume_run
from launcher.cli.start_run import show_started
from launcher.clusters.backends import FilesOnly, cluster_for, status_reader_for
from launcher.errors import SubmitError
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Status
from launcher.security import owners
from launcher.security.printable_stream import as_plain_lines
from launcher.shell_commands import launcher_command, short_path

_LOG_POLL_S = 0.3
# A line may be of any length.
_LOG_BLOCK_BYTES = 1 << 20
_INTERRUPTIONS = (Cause.CANCELLED, Cause.LIMIT, Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.RESIZED)


def show_log(arguments: argparse.Namespace) -> int:
    """Print the output of a rank; with --follow until the run ends."""
    run = run_store.find_run(arguments.run, Path(arguments.root))
    attempt = run_store.newest_attempt(run) if arguments.attempt is None else arguments.attempt
    output = _RankOutput(run, arguments.rank, attempt)
    _require_in_run(run, arguments.attempt, arguments.rank)
    reader = status_reader_for(run, run_store.load_plan(run).config.cluster.kind)
    if not output.log.is_file() and not arguments.follow:
        folder = run.attempt(output.attempt)
        logs = sorted(path.name for path in folder.glob("*.log")) if folder.is_dir() else []
        raise SubmitError(
            f"rank {arguments.rank} has no log in attempt {output.attempt}",
            where=str(output.log),
            value=_end_line(run, output.attempt, reader.status(run)),
            remedy=f"existing logs: {', '.join(logs)}" if logs else "wait until the attempt has started",
        )
    watch, is_silent = StatusWatch(run, reader), False
    while True:
        status = watch.state()
        is_running = status.state in RUNNING_STATES
        output.print_more()
        is_silent = is_running and isinstance(reader, FilesOnly) and reader.is_silent
        if not arguments.follow or not is_running or is_silent:
            break
        newest = run_store.newest_attempt(run)
        if arguments.attempt is None and newest != output.attempt:
            # Show the end of the previous attempt's log before the log of the next one.
            output.print_more()
            output.attempt, output.offset = newest, 0
        time.sleep(_LOG_POLL_S)
    output.print_agent_log()
    if line := _end_line(run, output.attempt, status):
        print(f"\n{line}")
    if arguments.follow and is_silent:
        print(f"\nnot followed: {status.message}")
    return 0


@dataclass
class _RankOutput:
    """The log of a rank in an attempt, printed as it grows: `offset` is the end of what was printed."""

    run: RunDir
    rank: int
    attempt: int
    offset: int = 0

    @property
    def log(self) -> Path:
        return self.run.rank_log(self.attempt, self.rank)

    def print_more(self) -> None:
        """Print new output."""
        if not self.log.is_file():
            return
        with suppress(FileNotFoundError), open(self.log, "rb") as file:
            file.seek(self.offset)
            for data in iter(lambda: file.readline(_LOG_BLOCK_BYTES), b""):
                sys.stdout.write(as_plain_lines(data.decode(errors="replace")))
                self.offset += len(data)
        sys.stdout.flush()

    def print_agent_log(self) -> None:
        """Print the agent's output if the rank has left none."""
        agent = self.run.attempt(self.attempt) / "agent.log"
        if not self.log.is_file() and agent.is_file():
            print(as_plain_lines(agent.read_text(errors="replace")), end="")


def _require_in_run(run: RunDir, attempt: int | None, rank: int) -> None:
    """Reject an attempt or a rank that the run does not have.

    Raises:
        SubmitError: with the existing ones.
    """
    attempts = run_store.attempt_numbers(run)
    if attempt is not None and attempt not in attempts:
        remedy = f"choose one of: {', '.join(map(str, attempts))}" if attempts else "wait until the run has started"
        raise SubmitError(f"the run has no attempt {attempt}", where="--attempt", value=str(attempt), remedy=remedy)
    num_ranks = run_store.read_placement(run).num_ranks
    if not 0 <= rank < num_ranks:
        remedy = f"choose a rank from 0 to {num_ranks - 1}" if num_ranks > 1 else "leave it out: the only rank is 0"
        raise SubmitError(f"the run has no rank {rank}", where="--rank", value=str(rank), remedy=remedy)


def _end_line(run: RunDir, attempt: int, status: Status) -> str:
    """Return one line on how an incomplete attempt ended; empty if it is running or has completed."""
    message, how = status.message if status.state == "failed" else "", "failed"
    if attempt != run_store.newest_attempt(run):
        record = run_records.read_exit(run, attempt)
        message = "" if record is None or record.state == "completed" else record.message
        if record is not None and record.cause in _INTERRUPTIONS:
            how = f"ended ({record.cause})"
    line, _, _ = message.partition("\n")
    return f"attempt {attempt} {how}: {line}" if line else ""


def cancel_run(arguments: argparse.Namespace) -> int:
    """Ask a run to save and stop."""
    run = run_store.find_run(arguments.run, Path(arguments.root))
    owners.require_run(run.root)
    cluster_for(run_store.load_plan(run).config.cluster.kind).cancel(run, save=arguments.save)
    request = "requested: save and stop" if arguments.save else "requested: stop without saving"
    print(f"{request}; watch it with: {launcher_command('status', short_path(run.root))}")
    return 0


def resume(arguments: argparse.Namespace) -> int:
    """Start the next attempt of a run, which may be in a mirror, and follow it if requested."""
    if "://" in arguments.run:
        from launcher.cli import mirror

        run = mirror.download_run(arguments.run, Path(arguments.root), arguments.step)
    else:
        run = run_store.find_run(arguments.run, Path(arguments.root))
    owners.require_run(run.root)
    plan = run_store.load_plan(run)
    if plan.config.cluster.runs_on_every_node:
        from launcher.cli import every_node

        return every_node.resume(run, plan, arguments)
    cluster = cluster_for(plan.config.cluster.kind)
    with Interrupts() as interrupts:
        with run_store.start_lock(run):
            attempt = resume_run(
                run,
                plan,
                cluster,
                arguments.overrides,
                arguments.step,
                interrupts,
                arguments.force,
                accepts_cost=arguments.yes,
            )
        if arguments.follow if arguments.follow is not None else plan.config.cluster.is_followed:
            return follow(run, attempt, cluster, interrupts)
        show_started(run, cluster.submission_details(run, attempt))
        return interrupted_start(run) if interrupts.received else 0
