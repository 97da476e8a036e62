"""Follow a run until it ends: messages, and one live line on a terminal or plain lines elsewhere."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher import run_records, run_store
from launcher.checkpoint import store
from launcher.checkpoint.manifest import MANIFEST, Checkpoint
from launcher.cli.interaction import Interrupts
from launcher.cli.render import terminal
from launcher.cli.render.sections import Commands, Part, Rows, Section
from launcher.clusters.backends import Cluster, StatusReader
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, RunError, SubmitError, printable
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Status
from launcher.security.printable_stream import raw
from launcher.shell_commands import launcher_command, shell_command, short_path
from launcher.tracking.jsonl import Tail, read_events
from launcher.tracking.metrics import format_step
from launcher.tracking.progress import EVENT as PROGRESS
from launcher.tracking.run_metrics import has_trained

_POLL_S = 0.15
# Events that the closing lines report.
_HIDDEN_EVENTS = ("summary", "end")
# Limits that stop a run and must be raised before it can continue.
_LIMITS = ("run.max_hours", "run.max_usd")


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


def follow(run: RunDir, attempt: int, cluster: Cluster, interrupts: Interrupts | None = None) -> int:
    """Show an attempt until it ends; returns the exit code. The first Ctrl-C saves and stops the run, the second kills it.

    `interrupts` holds the interrupts since the run was started.
    """
    events, metrics = Tail(run.events), Tail(run.metrics)
    with _open_screen() as screen, Interrupts() as own:
        collected = interrupts or own
        collected.defer()
        num_handled, watch = 0, StatusWatch(run, cluster)
        shown = ""
        while True:
            # Read the state before the files, so that everything written before the final state is shown.
            status = watch.state()
            if status.state in RUNNING_STATES and (start := _describe_start(run, attempt, status)) != shown:
                screen.live(start)
                shown = start
            for line in sorted([*events.poll(), *metrics.poll()], key=lambda line: line["time"]):
                if line["attempt"] >= attempt:
                    _show_line(run, line, status, screen)
            if status.state not in RUNNING_STATES:
                break
            if len(collected.received) > num_handled:
                num_handled += 1
                _request_stop(run, cluster, screen, num_handled)
            time.sleep(_POLL_S)
    cluster.await_end(run)
    return _print_result(run, attempt, status)


def _describe_start(run: RunDir, attempt: int, status: Status) -> str:
    """Return what the run waits for while it is pending, such as its place in a scheduler's queue; else where its logs are."""
    if status.state == "pending" and status.message:
        return f"pending: {printable(status.message)}"
    return f"starting; logs in {short_path(run.attempt(attempt))}"


def _show_line(run: RunDir, line: dict[str, Any], status: Status, screen: _Screen) -> None:
    if "kind" in line:
        # Ranks write absolute paths.
        text = printable(line["text"]).replace(f"{run.root.absolute()}/", f"{short_path(run.root.absolute())}/")
        if line["kind"] == PROGRESS:
            screen.live(text)
        elif line["kind"] not in _HIDDEN_EVENTS and not line.get("fields", {}).get("is_closing"):
            screen.say(text)
    elif "train/loss" in line:
        screen.live(format_step(line, status.max_steps))


class _Screen:
    """Output without a terminal: every live line is printed as a line."""

    def say(self, line: str) -> None:
        print(line, flush=True)

    def live(self, line: str) -> None:
        self.say(line)


class _Terminal(_Screen):
    """Output on a terminal: one live line at the bottom, messages above it."""

    def __init__(self, live: Any) -> None:
        self._live = live

    def say(self, line: str) -> None:
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def live(self, line: str) -> None:
        from rich.text import Text

        self._live.update(Text(line, overflow="ellipsis", no_wrap=True))


@contextmanager
def _open_screen() -> Iterator[_Screen]:
    if not sys.stdout.isatty():
        yield _Screen()
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(file=raw(sys.stdout))
    with Live("", console=console, refresh_per_second=8, transient=False) as live:
        yield _Terminal(live)


def _request_stop(run: RunDir, cluster: Cluster, screen: _Screen, num_requests: int) -> None:
    try:
        cluster.cancel(run)
    except SubmitError:
        # The run has just ended.
        return
    except RunError as error:
        screen.say(f"the stop request failed: {error.problems[0].message}; try again")
        return
    screen.say("saving, then stopping; Ctrl-C again kills the run without saving" if num_requests == 1 else "killing the run")


def interrupted_start(run: RunDir) -> int:
    """Report that a run continues although its start was interrupted; returns the exit code."""
    print(f"interrupted, but the run has started; stop it with: {launcher_command('cancel', short_path(run.root))}", flush=True)
    return EXIT_INTERRUPTED


def _print_result(run: RunDir, attempt: int, status: Status) -> int:
    """Print the result: paths and next commands, or the failure; returns the exit code."""
    name = short_path(run.root)
    print()
    if status.state == "completed":
        terminal.show(*_list_results(run), label_columns=13)
        return 0
    page = wandb_words(wandb_page(run, read_events(run.events)))
    if status.state == "failed":
        _print_failure(run, attempt, status)
        if page:
            print(f"  W&B:    {page}", file=sys.stderr)
        return EXIT_FAILED
    print(f"{status.state}: {status.message}")
    if page:
        print(f"W&B run: {page}")
    if store.list_checkpoints(run.checkpoints):
        limit = next((f" {key}=..." for key in _LIMITS if status.message.startswith(f"{key}=")), "")
        print(f"continue with: {launcher_command('resume', name)}{limit}")
    elif not has_trained(run, status):
        print(f"start it again with: {launcher_command('resume', name)}")
    return EXIT_INTERRUPTED


def wandb_page(run: RunDir, events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the run's `url` in W&B and the `sync_command` that uploads an offline run, from the last event that has them.

    Either may be None or empty; both are missing before the W&B run has started. The command names the files where they are now,
    because the run directory may have been moved.
    """
    page: dict[str, Any] = {}
    for fields in (event["fields"] for event in events):
        # Hub upload events also have a url, but no sync_command.
        if "sync_command" in fields:
            page |= {name: fields[name] for name in ("url", "sync_command") if name in fields}
    if command := page.get("sync_command"):
        words = shlex.split(str(command))
        for number, path in enumerate(map(Path, words)):
            folder = run.root.absolute() / "wandb" / path.name
            if path.parent.name == "wandb" and folder.is_dir():
                words[number] = str(folder)
        page["sync_command"] = shell_command(*words)
    return page


def wandb_words(page: Mapping[str, Any]) -> str:
    """Format the result of `wandb_page`; empty if there is neither."""
    url, command = page.get("url") or "", page.get("sync_command")
    if not command:
        return url
    return f"{url}; upload the missing part with: {command}" if url else f"offline; upload it with: {command}"


def _list_results(run: RunDir) -> list[Part]:
    """Return where the results of a completed run are, and what to run next."""
    rows, checkpoints = [], store.list_checkpoints(run.checkpoints)
    if checkpoints:
        rows.append(("checkpoint", short_path(checkpoints[-1].path)))
    if page := wandb_words(wandb_page(run, read_events(run.events))):
        rows.append(("W&B run", page))
    if run.export.is_dir():
        rows.append(("exported to", _describe_export(run, checkpoints[-1] if checkpoints else None)))
    name, status = short_path(run.root), run_store.read_status(run)
    # With fewer steps than planned, a run is complete because of eval.stop_after.
    ended_early = status.max_steps is not None and status.step < status.max_steps
    commands = [
        launcher_command("status", name),
        *([launcher_command("evaluate", name)] if has_held_out(run) else []),
        launcher_command("resume", name, "eval.stop_after=0" if ended_early else "train.max_steps=..."),
        *(["python -m launcher init --data YOUR.jsonl --model qwen3_8b"] if is_demonstration(run) else []),
    ]
    return [Rows(rows), Section("next:", [Commands(commands)])]


def has_held_out(run: RunDir) -> bool:
    """Return whether a run has held-out documents, which `evaluate` needs."""
    data = run_store.load_plan(run).data
    return data is not None and data.num_eval_rows > 0


def is_demonstration(run: RunDir) -> bool:
    """Return whether a run trained only on the rows that come with the launcher."""
    # The settings import pydantic, which commands that only read a run avoid.
    from launcher.config.sections.data import STDLIB_DOCS

    return all(source.path == STDLIB_DOCS for source in run_store.load_plan(run).config.data.sources)


def _describe_export(run: RunDir, newest: Checkpoint | None) -> str:
    """Name the export, with its step if that differs from the newest checkpoint's; name an export that is older than that."""
    record = run_records.read_export(run)
    if record is None or newest is None or record.step == newest.step:
        return short_path(run.export)
    text = f"{short_path(run.export)}, which holds step {record.step}"
    if run_records.export_file(run).stat().st_mtime >= (newest.path / MANIFEST).stat().st_mtime:
        return text
    return f"{text}; export step {newest.step} with: {launcher_command('export', short_path(run.root))}"


def _print_failure(run: RunDir, attempt: int, status: Status) -> None:
    # The backend may have started further attempts; agent.log of the submitted attempt covers all of them.
    record = run_records.read_exit(run, run_store.newest_attempt(run))
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
