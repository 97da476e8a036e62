"""The verbs that act on an existing run: logs, cancel, resume."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import run_records, run_store
from launcher.cli import formatting
from launcher.cli.arguments import VerbParser
from launcher.cli.follow import StatusWatch, follow, interrupted_start
from launcher.cli.resume import resume_run
from launcher.cli.starting.interrupts import Interrupts
from launcher.cli.views.plan_view import started_lines
from launcher.clusters.backends import FilesOnly, StatusReader, cluster_for, status_reader_for
from launcher.errors import SubmitError
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Status
from launcher.security import owners
from launcher.security.printable_stream import as_plain_lines
from launcher.shell_commands import launcher_command

_LOG_POLL_S = 0.3
# A line may be of any length.
_LOG_BLOCK_BYTES = 1 << 20
_INTERRUPTIONS = (Cause.CANCELLED, Cause.LIMIT, Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.RESIZED)


def run(verb: str, tokens: list[str]) -> int:
    """Execute the verb on a run; returns the exit code."""
    arguments = _parser(verb).parse_intermixed_args(tokens)
    if verb == "resume" and "://" in arguments.run:
        from launcher.cli import mirror

        downloaded = mirror.download_run(arguments.run, Path(arguments.root), arguments.step)
        owners.require_run(downloaded.root)
        return _resume(downloaded, arguments)
    run_dir = run_store.find_run(arguments.run, Path(arguments.root))
    if verb != "logs":
        owners.require_run(run_dir.root)
    return {"logs": _logs, "cancel": _cancel, "resume": _resume}[verb](run_dir, arguments)


def _parser(verb: str) -> argparse.ArgumentParser:
    about = {
        "logs": "Show the output of a rank.",
        "cancel": "Save and stop a run; a second cancel kills it.",
        "resume": "Continue a run from its newest checkpoint.",
    }[verb]
    parser = VerbParser(prog=f"python -m launcher {verb}", description=about)
    parser.add_root()
    address = ", or its address in a mirror, URL/NAME" if verb == "resume" else ""
    parser.add_argument("run", metavar="RUN", help=f"name of the run, or path of its directory{address}")
    if verb == "logs":
        parser.add_argument("-f", "--follow", action="store_true", help="follow until the run ends")
        parser.add_argument("--rank", type=int, default=0, help="which rank (default: 0)")
        parser.add_argument("--attempt", type=int, help="which attempt (default: the last)")
    if verb == "cancel":
        save = "save a checkpoint before stopping (default); a second cancel kills the run"
        parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help=save)
    if verb == "resume":
        parser.add_argument("overrides", nargs="*", help="settings to change, such as train.max_steps=2000")
        follow = "follow the run to its end (default on this machine)"
        parser.add_argument("--follow", action="store_true", default=None, help=follow)
        parser.add_argument("--detach", dest="follow", action="store_false", help="return at once (default on a cluster)")
        force = "continue with data and settings that differ from those of the checkpoint; without --force they are listed"
        parser.add_argument("--force", action="store_true", help=force)
        cost = "do not ask before the run gets more steps, whatever run.confirm_usd says"
        parser.add_argument("--yes", action="store_true", help=cost)
        parser.add_argument("--step", type=int, help="go back to the checkpoint of this step; later ones are set aside")
    return parser


def _logs(run: RunDir, arguments: argparse.Namespace) -> int:
    attempt = run_store.newest_attempt(run) if arguments.attempt is None else arguments.attempt
    output = _RankOutput(run, arguments.rank, attempt)
    _require_in_run(run, arguments.attempt, arguments.rank)
    reader = _reader(run)
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


def _reader(run: RunDir) -> StatusReader:
    return status_reader_for(run, run_store.load_plan(run).config.cluster.kind)


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


def _cancel(run: RunDir, arguments: argparse.Namespace) -> int:
    cluster_for(run_store.load_plan(run).config.cluster.kind).cancel(run, save=arguments.save)
    request = "requested: save and stop" if arguments.save else "requested: stop without saving"
    print(f"{request}; watch it with: {launcher_command('status', formatting.short(run.root))}")
    return 0


def _resume(run: RunDir, arguments: argparse.Namespace) -> int:
    plan = run_store.load_plan(run)
    if plan.config.cluster.runs_on_every_node:
        from launcher.cli.starting import every_node

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
        print("\n".join(started_lines(run.root, cluster.submission_details(run, attempt))))
        return interrupted_start(run) if interrupts.received else 0
