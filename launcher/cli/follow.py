"""Follow a run, show the log of a rank, and cancel a run: the verbs logs and cancel, and what verbs do after they start one."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.checkpoint import store
from launcher.cli.render import terminal
from launcher.cli.render.sections import Commands, Rows, Section
from launcher.clusters.backends import Cluster, FilesOnly, StatusReader, cluster_for, status_reader_for
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, RunError, SubmitError, printable
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_records, run_store
from launcher.runs.run_records import RUNNING_STATES, Status
from launcher.security.redaction import as_plain_lines, raw
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking.jsonl import Tail, read_events
from launcher.tracking.metrics import format_step
from launcher.tracking.progress import EVENT as PROGRESS
from launcher.tracking.progress import Say
from launcher.tracking.run_metrics import has_trained

_POLL_S, _LOG_POLL_S = 0.15, 0.3
# A further interrupt ends the command.
_MAX_COLLECTED = 2
# Events that the closing lines report.
_HIDDEN_EVENTS = ("summary", "end")
# Limits that stop a run and must be raised before it can continue.
_LIMITS = ("run.max_hours", "run.max_usd")
# A line of a log may be of any length.
_LOG_BLOCK_BYTES = 1 << 20
_INTERRUPTIONS = (Cause.CANCELLED, Cause.LIMIT, Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.RESIZED)


class StatusWatch:
    """The state of a watched run: reads its files on each call, and asks its backend every `status_interval_s` seconds."""

    def __init__(self, run: RunDir, backend: StatusReader) -> None:
        self._run, self._backend = run, backend
        self._asked_at = -math.inf
        self._status: Status | None = None

    def state(self) -> Status:
        """Return the latest known status."""
        is_due = time.monotonic() > self._asked_at + self._backend.status_interval_s
        if self._status is None or is_due or run_store.read_status(self._run).state not in RUNNING_STATES:
            self._status, self._asked_at = self._backend.status(self._run), time.monotonic()
        return self._status


class Interrupts:
    """Ctrl-C ends the command until `defer` is called; then INT and TERM are collected in `received`, and a third one ends it."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """Collect signals from now on."""

        def collect(number: int, _: object) -> None:
            self.received.append(number)
            if len(self.received) > _MAX_COLLECTED:
                raise KeyboardInterrupt

        if not self._before:
            self._before = {number: signal.signal(number, collect) for number in (signal.SIGINT, signal.SIGTERM)}


def follow(run: RunDir, attempt: int, cluster: Cluster, interrupts: Interrupts | None = None) -> int:
    """Show an attempt until it ends; returns the exit code. The first Ctrl-C saves and stops the run, the second kills it."""
    events, metrics = Tail(run.events), Tail(run.metrics)
    # Ranks write absolute paths.
    folder = run.root.absolute()
    with _open_screen() as (say, show_live), Interrupts() as own:
        collected = interrupts or own
        collected.defer()
        num_handled, watch, shown = 0, StatusWatch(run, cluster), ""
        while True:
            # Read the state before the files, so that everything written before the final state is shown.
            status = watch.state()
            if status.state in RUNNING_STATES:
                start = f"starting; logs in {short_path(run.attempt(attempt))}"
                if status.state == "pending" and status.message:
                    # Such as its place in a scheduler's queue.
                    start = f"pending: {printable(status.message)}"
                if start != shown:
                    show_live(start)
                    shown = start
            for line in sorted([*events.poll(), *metrics.poll()], key=lambda line: line["time"]):
                if line["attempt"] < attempt:
                    continue
                if "kind" in line:
                    text = printable(line["text"]).replace(f"{folder}/", f"{short_path(folder)}/")
                    if line["kind"] == PROGRESS:
                        show_live(text)
                    elif line["kind"] not in _HIDDEN_EVENTS and not line.get("fields", {}).get("is_closing"):
                        say(text)
                elif "train/loss" in line:
                    show_live(format_step(line, status.max_steps))
            if status.state not in RUNNING_STATES:
                break
            if len(collected.received) > num_handled:
                num_handled += 1
                try:
                    cluster.cancel(run)
                except SubmitError:
                    # The run has just ended.
                    pass
                except RunError as error:
                    say(f"the stop request failed: {error.problems[0].message}; try again")
                else:
                    saving = "saving, then stopping; Ctrl-C again kills the run without saving"
                    say(saving if num_handled == 1 else "killing the run")
            time.sleep(_POLL_S)
    cluster.await_end(run)
    return _print_result(run, attempt, status)


@contextmanager
def _open_screen() -> Iterator[tuple[Say, Say]]:
    """Yield functions that print a line and that show a live line at the bottom; without a terminal, both print."""
    if not sys.stdout.isatty():
        say = partial(print, flush=True)
        yield say, say
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=raw(sys.stdout))
    with Live("", console=console, refresh_per_second=8, transient=False) as live:
        yield (
            partial(console.print, markup=False, highlight=False, soft_wrap=True),
            lambda line: live.update(Text(line, overflow="ellipsis", no_wrap=True)),
        )


def _print_result(run: RunDir, attempt: int, status: Status) -> int:
    """Print where the results are and what to run next, or the failure; returns the exit code."""
    name, checkpoints = short_path(run.root), store.list_checkpoints(run.checkpoints)
    page = wandb_words(wandb_page(read_events(run.events)))
    print()
    if status.state == "failed":
        _print_failure(run, attempt, status)
        if page:
            print(f"  W&B:    {page}", file=sys.stderr)
        return EXIT_FAILED
    if status.state != "completed":
        print(f"{status.state}: {status.message}")
        if page:
            print(f"W&B run: {page}")
        if checkpoints:
            limit = next((f" {key}=..." for key in _LIMITS if status.message.startswith(f"{key}=")), "")
            print(f"continue with: {launcher_command('resume', name)}{limit}")
        elif not has_trained(run, status):
            print(f"start it again with: {launcher_command('resume', name)}")
        return EXIT_INTERRUPTED
    rows = [("checkpoint", short_path(checkpoints[-1].path))] if checkpoints else []
    rows += [("W&B run", page)] if page else []
    if run.export.is_dir():
        exported, record = short_path(run.export), run_records.read_export(run)
        if record is not None and checkpoints and record.step != checkpoints[-1].step:
            exported += f", which holds step {record.step}"
        rows.append(("exported to", exported))
    plan, status = run_store.load_plan(run), run_store.read_status(run)
    # Commands that only read a run do not import the settings, which import pydantic.
    from launcher.config.sections.data import STDLIB_DOCS

    is_demonstration = all(source.path == STDLIB_DOCS for source in plan.config.data.sources)
    # With fewer steps than planned, a run is complete because of eval.stop_after.
    ended_early = status.max_steps is not None and status.step < status.max_steps
    commands = [
        launcher_command("status", name),
        *([launcher_command("evaluate", name)] if plan.data is not None and plan.data.num_eval_rows else []),
        launcher_command("resume", name, "eval.stop_after=0" if ended_early else "train.max_steps=..."),
        *(["python -m launcher init --data YOUR.jsonl --model qwen3_8b"] if is_demonstration else []),
    ]
    terminal.show(Rows(rows), Section("next:", [Commands(commands)]), label_columns=13)
    return 0


def _print_failure(run: RunDir, attempt: int, status: Status) -> None:
    # The backend may have started further attempts; agent.log of the submitted attempt covers all of them.
    record = journal.read_end(run, run_store.newest_attempt(run))
    failure = None if record is None else record.first_failure
    reason = ""
    if failure is not None:
        if failure.traceback:
            print(failure.traceback, file=sys.stderr)
        print(f"{failure.source} failed first: {failure.message}", file=sys.stderr)
        if failure.log:
            print(f"  log:    {short_path(failure.log)}", file=sys.stderr)
        reason = f"{failure.source}: {failure.message}"
    # The status says why the run does not continue, for example a spent retry budget.
    if status.message not in ("", reason):
        print(f"failed: {status.message}", file=sys.stderr)
    if not failure:
        job = run_store.read_attempt(run, attempt).job
        logs = [run.agent_log(attempt), *([run.agent_log(attempt, job)] if job else [])]
        print(f"  log:    {short_path(next((log for log in logs if log.is_file()), run.attempt(attempt)))}", file=sys.stderr)
    command = launcher_command("resume", short_path(run.root))
    if store.list_checkpoints(run.checkpoints):
        print(f"  next:   {command}", file=sys.stderr)
    elif not has_trained(run, status):
        print(f"  next:   {command}, which begins again: no step was trained", file=sys.stderr)
    else:
        print("  next:   start it again under another run.name; it has no checkpoint yet", file=sys.stderr)


def interrupted_start(run: RunDir) -> int:
    """Report that a run continues although its start was interrupted; returns the exit code."""
    print(f"interrupted, but the run has started; stop it with: {launcher_command('cancel', short_path(run.root))}", flush=True)
    return EXIT_INTERRUPTED


def wandb_page(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the run's `url` in W&B and the `sync_command` of an offline run, from the last event that has them."""
    page: dict[str, Any] = {}
    for fields in (event["fields"] for event in events):
        # Hub upload events also have a url, but no sync_command.
        if "sync_command" in fields:
            page |= {name: fields[name] for name in ("url", "sync_command") if name in fields}
    return page


def wandb_words(page: Mapping[str, Any]) -> str:
    """Format the result of `wandb_page`; empty if there is neither."""
    url, command = page.get("url") or "", page.get("sync_command")
    if not command:
        return url
    return f"{url}; upload the missing part with: {command}" if url else f"offline; upload it with: {command}"


def show_log(arguments: argparse.Namespace) -> int:
    """Print the output of a rank; with --follow until the run ends."""
    run = run_store.find_run(arguments.run, arguments.root)
    attempts, chosen, rank = run_store.attempt_numbers(run), arguments.attempt, arguments.rank
    if chosen is not None and chosen not in attempts:
        remedy = f"choose one of: {', '.join(map(str, attempts))}" if attempts else "wait until the run has started"
        raise SubmitError(f"the run has no attempt {chosen}", where="--attempt", value=str(chosen), remedy=remedy)
    placed = run_store.read_placement(run)
    if not 0 <= rank < placed.num_ranks:
        remedy = f"choose a rank from 0 to {placed.num_ranks - 1}" if placed.num_ranks > 1 else "leave it out: the only rank is 0"
        raise SubmitError(f"the run has no rank {rank}", where="--rank", value=str(rank), remedy=remedy)
    output = _RankOutput(run, rank, run_store.newest_attempt(run) if chosen is None else chosen)
    reader = status_reader_for(run, placed.kind)
    if not output.log.is_file() and not arguments.follow:
        folder = run.attempt(output.attempt)
        logs = sorted(path.name for path in folder.glob("*.log")) if folder.is_dir() else []
        raise SubmitError(
            f"rank {rank} has no log in attempt {output.attempt}",
            where=str(output.log),
            value=_describe_end(run, output.attempt, reader.status(run)),
            remedy=f"existing logs: {', '.join(logs)}" if logs else "wait until the attempt has started",
        )
    watch = StatusWatch(run, reader)
    while True:
        status = watch.state()
        is_running = status.state in RUNNING_STATES
        output.print_more()
        is_silent = is_running and isinstance(reader, FilesOnly) and reader.is_silent
        if not arguments.follow or not is_running or is_silent:
            break
        newest = run_store.newest_attempt(run)
        if chosen is None and newest != output.attempt:
            # Show the end of the previous attempt's log before the log of the next one.
            output.print_more()
            output.attempt, output.offset = newest, 0
        time.sleep(_LOG_POLL_S)
    output.print_agent_log()
    if line := _describe_end(run, output.attempt, status):
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


def _describe_end(run: RunDir, attempt: int, status: Status) -> str:
    """Return one line on how an incomplete attempt ended; empty if it is running or has completed."""
    message, how = status.message if status.state == "failed" else "", "failed"
    if attempt != run_store.newest_attempt(run):
        record = journal.read_end(run, attempt)
        message = "" if record is None or record.state == "completed" else record.message
        if record is not None and record.cause in _INTERRUPTIONS:
            how = f"ended ({record.cause})"
    line, _, _ = message.partition("\n")
    return f"attempt {attempt} {how}: {line}" if line else ""


def cancel_run(arguments: argparse.Namespace) -> int:
    """Ask a run to save and stop."""
    run = run_store.find_own_run(arguments.run, arguments.root)
    cluster_for(run_store.load_plan(run).config.cluster.kind).cancel(run, save=arguments.save)
    request = "requested: save and stop" if arguments.save else "requested: stop without saving"
    print(f"{request}; watch it with: {launcher_command('status', short_path(run.root))}")
    return 0
