"""Follow a run until it ends: messages as they come, one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from launcher import run_records, run_store
from launcher.checkpoint import store
from launcher.cli.formatting import short
from launcher.clusters.base import Cluster
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, RunError, SubmitError, printable
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Status
from launcher.tracking.console import format_step
from launcher.tracking.jsonl import Tail, read_events

_POLL_S = 0.15
# The closing lines say these in their own way.
_NOT_SHOWN = ("summary", "end")
# What has to be raised before a run goes on that it has stopped.
_LIMITS = ("run.max_hours", "run.max_usd")


class Watch:
    """The state of a run that is watched: what the run itself writes is read each time, its backend is asked now and then."""

    def __init__(self, run: RunDir, cluster: Cluster) -> None:
        self._run, self._cluster = run, cluster
        self._asked_at = -math.inf
        self._known: Status | None = None

    def state(self) -> Status:
        due = time.monotonic() > self._asked_at + self._cluster.status_interval_s
        if self._known is None or due or run_store.read_status(self._run).state not in RUNNING_STATES:
            self._known, self._asked_at = self._cluster.status(self._run), time.monotonic()
        return self._known


def follow(run: RunDir, attempt: int, cluster: Cluster) -> int:
    """Show the attempt until it ends; Ctrl-C once saves and stops it, twice kills it. Returns the exit code."""
    events, metrics = Tail(run.events), Tail(run.metrics)
    with _screen() as screen, _interrupts() as interrupts:
        acted, watch = 0, Watch(run, cluster)
        screen.live(f"starting; logs in {short(run.attempt(attempt))}")
        while True:
            # The state first: what was written before it changed is then read before the loop ends.
            status = watch.state()
            for line in sorted([*events.poll(), *metrics.poll()], key=lambda line: line["time"]):
                if line["attempt"] >= attempt:
                    _show(line, status, screen)
            if status.state not in RUNNING_STATES:
                break
            if len(interrupts) > acted:
                acted += 1
                _ask_to_stop(run, cluster, screen, acted)
            time.sleep(_POLL_S)
    cluster.await_end(run)
    return _closing(run, attempt, status)


def _show(line: dict[str, Any], status: Status, screen: _Screen) -> None:
    if "kind" in line:
        if line["kind"] not in _NOT_SHOWN:
            screen.say(printable(line["text"]))
    elif "train/loss" in line:
        screen.live(format_step(line, status.max_steps))


class _Screen:
    """Plain lines: what is live is printed like everything else."""

    def say(self, line: str) -> None:
        print(line, flush=True)

    def live(self, line: str) -> None:
        self.say(line)


class _Terminal(_Screen):
    """One line at the bottom that is rewritten; messages scroll above it."""

    def __init__(self, live: Any) -> None:
        self._live = live

    def say(self, line: str) -> None:
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def live(self, line: str) -> None:
        from rich.text import Text

        self._live.update(Text(line, overflow="ellipsis", no_wrap=True))


@contextmanager
def _screen() -> Iterator[_Screen]:
    if not sys.stdout.isatty():
        yield _Screen()
        return
    from rich.live import Live

    with Live("", refresh_per_second=8, transient=False) as live:
        yield _Terminal(live)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """While following, INT and TERM are collected instead of ending this process; the loop acts on them."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_to_stop(run: RunDir, cluster: Cluster, screen: _Screen, times: int) -> None:
    try:
        cluster.cancel(run)
    except SubmitError:
        # It has just ended by itself.
        return
    except RunError as error:
        screen.say(f"not stopped: {error.problems[0].what}; try again")
        return
    screen.say("saving, then stopping (again: kill it without saving)" if times == 1 else "killing it")


def _closing(run: RunDir, attempt: int, status: Status) -> int:
    """The last lines: where things lie and what to do next, or who failed and why."""
    name = short(run.root)
    print()
    if status.state == "completed":
        print("\n".join(_where_things_lie(run)))
        return 0
    if status.state == "failed":
        _print_failure(run, attempt, status)
        return EXIT_FAILED
    print(f"{status.state}: {status.message}")
    if store.list_checkpoints(run.checkpoints):
        limit = next((f" {key}=..." for key in _LIMITS if status.message.startswith(f"{key}=")), "")
        print(f"continue it:  python -m launcher resume {name}{limit}")
    return EXIT_INTERRUPTED


def wandb_page(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Where W&B has the run, its `url`, and the `sync_command` that uploads what it lacks, each as it was told last.

    Either may be None or empty; before W&B has begun there is neither.
    """
    page: dict[str, Any] = {}
    for fields in (event["fields"] for event in events):
        # Of the two, an address alone may be that of a model on the hub.
        if "sync_command" in fields:
            page |= {name: fields[name] for name in ("url", "sync_command") if name in fields}
    return page


def wandb_words(page: Mapping[str, Any]) -> str:
    """The same for a person; empty where there is nothing to see or to do."""
    url, command = page.get("url") or "", page.get("sync_command")
    if not command:
        return url
    return f"{url}; upload what it lacks with: {command}" if url else f"offline; upload it with: {command}"


def _where_things_lie(run: RunDir) -> list[str]:
    name = short(run.root)
    lines = []
    checkpoints = store.list_checkpoints(run.checkpoints)
    if checkpoints:
        lines.append(f"checkpoint   {short(checkpoints[-1].path)}")
    if page := wandb_words(wandb_page(read_events(run.events))):
        lines.append(f"W&B run      {page}")
    if run.export.is_dir():
        lines.append(f"exported to  {short(run.export)}")
    return [
        *lines,
        "",
        "next:",
        f"  python -m launcher status {name}",
        f"  python -m launcher resume {name} train.max_steps=...",
        "  python -m launcher data=jsonl data.path=YOUR.jsonl",
        "  python -m launcher plan experiment=llama3_8b_one_node data.path=YOUR.jsonl",
    ]


def _print_failure(run: RunDir, attempt: int, status: Status) -> None:
    # Attempts that followed by themselves are not the one that was submitted, whose folder holds the agent's log of them all.
    record = run_records.read_exit(run, run_store.newest_attempt(run))
    failure = None if record is None else record.first_failure
    said = ""
    if failure is not None:
        if failure.traceback:
            print(failure.traceback, file=sys.stderr)
        print(f"{failure.source} failed first: {failure.message}", file=sys.stderr)
        print(f"  log:    {short(failure.log)}", file=sys.stderr)
        said = f"{failure.source}: {failure.message}"
    # Which budget is spent, what was waited for in vain: the failure alone does not tell why the run does not go on.
    if status.message not in ("", said):
        print(f"failed: {status.message}", file=sys.stderr)
    if not failure:
        print(f"  log:    {short(run.attempt(attempt) / 'agent.log')}", file=sys.stderr)
    if store.list_checkpoints(run.checkpoints):
        print(f"  then:   python -m launcher resume {short(run.root)}", file=sys.stderr)
    else:
        print("  then:   start it again; it had no checkpoint yet", file=sys.stderr)
