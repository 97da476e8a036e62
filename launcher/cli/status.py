"""The verbs status and ls: the state, remaining time and cost of runs, from their files and backends."""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import clock
from launcher.checkpoint import store
from launcher.cli.follow import StatusWatch, wandb_page, wandb_words
from launcher.cli.render import terminal
from launcher.cli.render.sections import Rows, Table
from launcher.cli.verbs import DEFAULT_ROOT
from launcher.clusters import detached_process
from launcher.clusters.backends import StatusReader, cluster_for, status_reader_for
from launcher.errors import LauncherError, Problem, SubmitError, printable
from launcher.plan.run_dir import RunDir
from launcher.runs import locks, run_store
from launcher.runs.run_records import RUNNING_STATES, Status, read_export
from launcher.runs.run_store import Placement
from launcher.security import folders
from launcher.security.redaction import raw
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking import goodput, progress
from launcher.tracking.goodput import Breakdown
from launcher.tracking.jsonl import read_events
from launcher.tracking.metrics import format_age, format_duration, median_names, status_lines
from launcher.tracking.run_metrics import MetricsTail, newest_trained_step, read_tail
from launcher.tracking.verdicts import read_newest_verdict

_BARS = "▁▂▃▄▅▆▇█"
_CLEAR = "\x1b[H\x1b[J"
_ALERTS_SHOWN = 3
_CHECKPOINTS_SHOWN = 5
_NUM_QUERIES = 16
_PARTS_SHOWN = 4
# If the newest step is older than this, its age is shown.
_STALE_STEP_S = 60.0
# How long storage may fail while a run is watched.
_STORAGE_FAILURE_S = 60.0
# The remaining time is omitted after this time, and this many steps, without a report. An evaluation takes minutes.
_SILENT_S, _SILENT_STEPS = 600.0, 10


def show_run(arguments: argparse.Namespace) -> int:
    """Print the state of a run, once or, with --watch, every few seconds until it ends."""
    run, as_json, every_s = run_store.find_run(arguments.run, arguments.root), arguments.json, arguments.watch
    watch, read_at = StatusWatch(run, _find_reader(run)), time.monotonic()
    while True:
        try:
            values = summarize(run, watch.state())
        except (OSError, LauncherError) as error:
            # Storage may be available again at the next try.
            if every_s is None or time.monotonic() - read_at > _STORAGE_FAILURE_S:
                raise
            print(printable(f"the run cannot be read now: {_describe_error(error)}"), file=sys.stderr)
            time.sleep(every_s)
            continue
        read_at = time.monotonic()
        clear = every_s is not None and not as_json and sys.stdout.isatty()
        if clear:
            raw(sys.stdout).write(_CLEAR)
        if as_json:
            print(terminal.as_json(values, 2 if every_s is None else None), flush=True)
        else:
            terminal.show(status_rows(values))
        if every_s is None or values["state"] not in RUNNING_STATES:
            return 0
        time.sleep(every_s)
        if not as_json and not clear:
            print()


def list_runs(arguments: argparse.Namespace) -> int:
    """Print the runs of a folder, newest first, or those of a mirror; name unreadable runs on standard error."""
    if "://" in (arguments.folder or ""):
        from launcher.cli import mirror

        return mirror.list_runs(arguments.folder, arguments.json)
    root = Path(arguments.folder or arguments.root)
    if (root / "plan.json").is_file():
        remedy = f"show this run with: {launcher_command('status', root)}"
        raise SubmitError("this is the directory of a run, not a folder of runs", where=str(root), remedy=remedy)
    # The first run creates the default.
    if not root.is_dir() and str(root) != DEFAULT_ROOT:
        raise SubmitError("there is no such folder", where=str(root), remedy="name the folder of the runs")
    runs = list(run_store.list_runs(root))
    summaries: list[dict[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    # Wait for slow backends at the same time.
    with ThreadPoolExecutor(_NUM_QUERIES) as pool:
        answers = [pool.submit(lambda run: _find_reader(run).status(run), run) for run in runs]
    for run, answer in zip(runs, answers, strict=True):
        try:
            if arguments.json:
                summaries.append(summarize(run, answer.result()))
            else:
                rows.append(_list_row(run, answer.result()))
        except Exception as error:
            # One run must not hide the others.
            print(printable(f"{run.root.name}: {_describe_error(error)}").replace("\n", "\\n"), file=sys.stderr)
    if arguments.json:
        print(terminal.as_json(summaries))
    elif not rows:
        print(f"no runs under {root}; start one with: python -m launcher train; --root names another folder")
    else:
        terminal.show(Table(("run", "state", "step", "loss", "cost", "updated"), rows, numbers=(2, 3, 4)))
    return 0


def _list_row(run: RunDir, status: Status) -> tuple[str, ...]:
    """Return a run's line of `ls`; a thousand of them are read in two seconds, so only what the line needs."""
    tail, placed, spent = read_tail(run.metrics, num_points=0, num_recent=1), run_store.read_placement(run), None
    if placed.price is not None:
        run_store.adopt_clock(run)
        spent = _read_goodput(run, status, only_cost=True)
    step, loss, cost = newest_trained_step(run, status), tail.last.get("train/loss"), _sum_cost(spent, placed, None) or {}
    return (
        run.root.name,
        status.state,
        f"{step:,}/{status.max_steps:,}" if status.max_steps else f"{step:,}/?",
        "-" if loss is None else f"{loss:.4f}",
        "-" if cost.get("usd") is None else f"{'~' if cost['at_typical_price'] else ''}${cost['usd']:,.2f}",
        f"{format_age(status.updated_at)} ago",
    )


def _read_goodput(run: RunDir, status: Status, only_cost: bool = False) -> Breakdown | None:
    """Return where the time of a run went; None if it has no attempt, or its files do not show that."""
    with suppress(LauncherError, OSError, KeyError, TypeError, ValueError):
        if run_store.attempt_numbers(run):
            return goodput.read(run, clock.now(), status.state, only_cost=only_cost)
    return None


def _describe_error(error: Exception) -> str:
    return error.problems[0].message if isinstance(error, LauncherError) else str(error)


def _find_reader(run: RunDir) -> StatusReader:
    return status_reader_for(run, run_store.read_placement(run).kind)


def status_rows(values: dict[str, Any]) -> Rows:
    """Return the state of a run from what `summarize` returns."""
    metrics, stop_note = values["metrics"], ", stop requested" if values["asked_to_stop"] else ""
    done, total, age_s = values["step"], values["max_steps"], values["age_s"]
    is_old = values["state"] in RUNNING_STATES and age_s is not None and age_s >= _STALE_STEP_S
    reached = f"{done:,} of {total:,} ({done / total:.0%})" if total else f"{done:,} of ?"
    rows = [
        ("run", f"{values['name']} in {short_path(Path(values['dir']))}"),
        ("state", values["state"] + (f": {values['message']}" if values["message"] else "") + stop_note),
        ("attempt", str(values["attempt"])),
        ("step", f"{reached}, {format_duration(age_s)} ago" if is_old else reached),
    ]
    if values["progress"] is not None:
        rows.append(("progress", f"{values['progress']['text']} ({format_age(values['progress']['time'])} ago)"))
    if metrics:
        shown = dict(status_lines(metrics, values["usual"]))
        if "loss" in shown:
            shown["loss"] += f"  {sparkline(values['losses'])}"
        rows += shown.items()
        # After the last step, the progress of evaluation, save and export shows what is left.
        if values["left_s"] and not stop_note:
            after = " of training once it has machines" if values["state"] == "pending" else ""
            limit = f", until {values['limit']} stops it early" if values["limit"] else ""
            rows.append(("time left", f"{format_duration(values['left_s'])}{after}{limit}"))
    if (seconds_of := values["goodput"]) is not None:
        kept = f"{seconds_of['fraction']:.1%} of {format_duration(seconds_of['wall_s'])} was spent on kept steps"
        parts = sorted(((seconds_of[name], label) for name, label in goodput.LOST.items() if seconds_of[name] >= 1), reverse=True)
        lost = ", ".join(f"{label} {format_duration(seconds)}" for seconds, label in parts[:_PARTS_SHOWN])
        rows.append(("goodput", f"{kept}; {lost}" if lost else kept))
    if (cost := values["cost"]) is not None:
        spent = f"{cost['gpu_hours']:,.2f} {'GPU' if values['device'] == 'cuda' else 'rank'} hours"
        if cost["usd"] is not None:
            end = f", about ${cost['expected_usd']:,.2f} at the end" if cost["expected_usd"] is not None else ""
            of = "; at a typical price; set yours with cluster.price_per_gpu_hour" if cost["at_typical_price"] else ""
            spent = f"${cost['usd']:,.2f} so far ({spent}){end}{of}"
        rows.append(("cost", spent))
    if values["eval_loss"] is not None:
        rows.append(("held out", f"loss {values['eval_loss']:.4f} after step {values['eval_step']:,}"))
    if values["checkpoints"]:
        shown_steps = ", ".join(f"step {step}" for step in values["checkpoints"][-_CHECKPOINTS_SHOWN:])
        num_older = len(values["checkpoints"]) - _CHECKPOINTS_SHOWN
        rows.append(("checkpoints", f"{shown_steps}, and {num_older} older" if num_older > 0 else shown_steps))
    rows += [("not usable", f"step {step}: {problem}") for step, problem in values["unusable_checkpoints"].items()]
    if values["export"] is not None:
        of_step = values["export_step"]
        is_newest = of_step is None or of_step in values["checkpoints"][-1:]
        rows.append(("export", short_path(Path(values["export"])) + ("" if is_newest else f" (step {of_step:,})")))
    if page := wandb_words(values["wandb"]):
        rows.append(("W&B", page))
    if values["verdict"] is not None:
        rows.append(("verdict", f"step {values['verdict']['step']:,}: {values['verdict']['sentence']}"))
    if values["answers"] is not None:
        rows.append(("answers", values["answers"]))
    if values["mirror"] is not None:
        rows.append(("mirror", values["mirror"]))
    for alert in values["alerts"][-_ALERTS_SHOWN:]:
        at = "" if alert["step"] is None else f", step {alert['step']}"
        rows.append(("alert", f"{alert['text']} ({format_age(alert['time'])} ago{at})"))
    return Rows(rows)


def sparkline(values: Sequence[float]) -> str:
    """Return one bar for each value, scaled from lowest to highest; an exclamation mark for non-finite values."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else "!" for value in values)


def summarize(run: RunDir, status: Status) -> dict[str, Any]:
    """Return the state, the metrics of the last training step, and values derived from both."""
    run_store.adopt_clock(run)
    number = max(status.attempt, run_store.newest_attempt(run))
    resumed = _read_resumed_steps(run)
    tail = read_tail(run.metrics, resumed=resumed)
    placed = run_store.read_placement(run)
    committed, unusable = store.open_all(run.checkpoints)
    checkpoints = [checkpoint.step for checkpoint in committed]
    events = read_events(run.events)
    spent = _read_goodput(run, status)
    recent = {name: [line[name] for line in tail.recent if name in line] for name in median_names()}
    medians = {name: statistics.median(numbers) for name, numbers in recent.items() if numbers}
    step, age_s, rest = newest_trained_step(run, status), None, _Remaining()
    if tail.last:
        # status.json also has the steps between logged ones.
        reported_at = status.updated_at if step > tail.last["trainer/step"] else tail.last["time"]
        age_s = max(0.0, clock.now() - float(reported_at))
    if status.state in RUNNING_STATES:
        # Without the attempt's files, it continues from the last known step.
        start_step: int | None = resumed.get(number, int(tail.last.get("trainer/step", 0)))
        if tail.last and tail.last["attempt"] == number:
            # It is training, or its job was requeued and continues from the newest checkpoint.
            start_step = max(checkpoints, default=0) if status.state == "pending" else None
        step_s = medians.get("time/step_s", math.nan)
        rest = _estimate_remaining(tail, status, start_step, step_s, age_s, spent, placed)
    verdict = None
    with suppress(OSError, LauncherError):
        if (judged := read_newest_verdict(run)) is not None:
            verdict = {"step": judged.step, "outcome": judged.verdict.outcome.value, "sentence": judged.verdict.sentence}
    # What the newest attempt does now, such as loading the weights.
    newest = events[-1] if events else {"kind": None, "attempt": None}
    is_progress = status.state in RUNNING_STATES and (newest["kind"], newest["attempt"]) == (progress.EVENT, number)
    return {
        "name": run.root.name,
        "dir": str(run.root),
        **asdict(status),
        "attempt": number,
        "step": step,
        "age_s": age_s,
        "metrics": tail.last,
        "usual": medians,
        "losses": list(tail.losses),
        "eval_loss": tail.eval_loss,
        "eval_step": tail.eval_step,
        "left_s": rest.seconds,
        "limit": rest.limit,
        "asked_to_stop": status.state in RUNNING_STATES and run.cancel(number).is_file(),
        "checkpoints": checkpoints,
        "unusable_checkpoints": {step: store.format_problems(error.problems) for step, error in unusable.items()},
        "export": str(run.export) if run.export.is_dir() else None,
        "export_step": exported.step if run.export.is_dir() and (exported := read_export(run)) is not None else None,
        "device": placed.device,
        "cost": _sum_cost(spent, placed, rest.usd),
        "goodput": _list_goodput(spent),
        "alerts": [{"time": e["time"], "step": e["step"], "text": e["text"]} for e in events if e["kind"] == "alert"],
        "wandb": wandb_page(events),
        "progress": {"time": newest["time"], "text": newest["text"]} if is_progress else None,
        "answers": next((e["text"] for e in reversed(events) if e["kind"] == "answers"), None),
        "verdict": verdict,
        "mirror": next((e["text"] for e in reversed(events) if e["kind"] == "mirror"), None),
    }


def _read_resumed_steps(run: RunDir) -> dict[int, int]:
    """Return the step from which each attempt continued, skipping unreadable attempts."""
    steps = {}
    for number in run_store.attempt_numbers(run):
        with suppress(LauncherError, OSError):
            if (attempt := run_store.find_attempt(run, number)) is not None:
                steps[number] = attempt.resume_step or 0
    return steps


@dataclass(frozen=True)
class _Remaining:
    """The remainder of a run: seconds, US dollars at the end, and the limit that stops it early; unknown values are None."""

    seconds: float | None = None
    usd: float | None = None
    limit: str | None = None


def _estimate_remaining(
    tail: MetricsTail,
    status: Status,
    start_step: int | None,
    step_s: float,
    age_s: float | None,
    spent: Breakdown | None,
    placed: Placement,
) -> _Remaining:
    """Return the remainder of an active run: from its last step, or from median step times if it will train from `start_step`."""
    usd = None if spent is None else spent.usd
    if start_step is None:
        left_s = tail.last.get("trainer/eta_s", math.nan)
        is_silent = age_s is not None and age_s > max(_SILENT_S, _SILENT_STEPS * (step_s if step_s > 0 else 0.0))
    else:
        left_s = max(0, status.max_steps - start_step) * step_s if status.max_steps else math.nan
        is_silent = False
    if is_silent or not math.isfinite(left_s):
        return _Remaining()
    # Seconds with machines until each limit is reached.
    limits = []
    if placed.max_hours is not None:
        held_s = 0.0 if spent is None else spent.held_s
        limits.append((placed.max_hours * 3600 - held_s, f"run.max_hours={placed.max_hours:g}"))
    usd_per_s = None if placed.price is None else placed.num_ranks * placed.price.usd_per_gpu_hour / 3600
    if placed.max_usd is not None and usd is not None and usd_per_s:
        limits.append(((placed.max_usd - usd) / usd_per_s, f"run.max_usd={placed.max_usd:g}"))
    until_s, limit = min(limits, default=(math.inf, None))
    if until_s < left_s:
        left_s = max(0.0, until_s)
    else:
        limit = None
    at_end = None if usd is None or usd_per_s is None else usd + usd_per_s * left_s
    return _Remaining(left_s, at_end, limit)


def _list_goodput(spent: Breakdown | None) -> dict[str, float] | None:
    """Return the time since submission and its parts in seconds; None before the first kept step."""
    if spent is None or not spent.kept_s:
        return None
    lost = {name: getattr(spent, name) for name in goodput.LOST}
    return {"fraction": spent.goodput, "wall_s": spent.wall_s, "kept_s": spent.kept_s, **lost, "lost_steps": spent.lost_steps}


def _sum_cost(spent: Breakdown | None, placed: Placement, expected_usd: float | None) -> dict[str, Any] | None:
    """Return GPU hours and US dollars so far, plus estimated dollars at the end if possible; None if nothing is counted."""
    if spent is None or not spent.gpu_s or (placed.device == "cpu" and placed.price is None):
        return None
    typical = spent.assumed_usd > 0
    return {"gpu_hours": spent.gpu_s / 3600, "usd": spent.usd, "expected_usd": expected_usd, "at_typical_price": typical}


def require_ended(run: RunDir) -> None:
    """Refuse a run that another machine still refreshes although its backend judges that it has ended."""
    if not detached_process.is_still_refreshed(run, functools.partial(print, file=sys.stderr, flush=True)):
        return
    raise SubmitError(
        "the run is still alive, although its last sign of life seems to be minutes old: the clocks of two machines differ",
        where=str(run.root),
        value=_describe_attempt(run, run_store.read_status(run), run_store.newest_attempt(run)),
        remedy="compare `date` on both machines, and correct the wrong clock; to stop the run, type cancel on its own machine",
    )


def require_idle(run: RunDir, backend: StatusReader) -> None:
    """Refuse to start a run that is already running."""
    status = backend.status(run)
    if status.state not in RUNNING_STATES:
        require_ended(run)
        return
    name = short_path(run.root)
    starter = locks.read_holder(run.lock) if status.job is None else None
    number = run_store.newest_attempt(run)
    where = f"being started by {starter}" if starter is not None else _describe_attempt(run, status, number)
    raise SubmitError(
        f"the run is {status.state} already",
        where=str(run.root),
        value=where,
        remedy=f"follow it with: {launcher_command('logs', name, '-f')}, or stop it with: {launcher_command('cancel', name)}",
    )


def find_living_problem(run: RunDir) -> Problem | None:
    """Return why a run counts as live, or None if its backend knows that it has ended."""
    try:
        recorded = run_store.read_status(run)
        # A final state is the same on every backend, so a damaged plan need not be read.
        status = recorded
        if recorded.state in RUNNING_STATES:
            status = cluster_for(run_store.read_placement(run).kind).status(run)
    except LauncherError as error:
        first = error.problems[0]
        message = f"it is unknown whether the run {run.root.name} has ended: {first.message}"
        remedy = f"{first.remedy}; or, if no process of it lives, remove its folder yourself".removeprefix("; or, ")
        return Problem(message, first.where or str(run.root), first.value, remedy)
    if status.state in RUNNING_STATES:
        cancel = f"stop it first: {launcher_command('cancel', run.root)}"
        return Problem(f"the run {run.root.name} is {status.state}", str(run.root), status.message, cancel)
    try:
        require_ended(run)
    except SubmitError as error:
        return error.problems[0]
    if (process := detached_process.find_process(recorded)) is not None:
        message = f"the run {run.root.name} is {status.state}, but its process is still uploading or closing files"
        return Problem(message, str(run.root), f"process {process.pid}", "wait until it has ended")
    return None


def _describe_attempt(run: RunDir, status: Status, attempt: int) -> str:
    """Return an attempt's job or process, its nodes, its user and its start."""
    job = status.job or {}
    started_at = job.get("started")
    if "pid" in job:
        location = f"process {job['pid']} on {job.get('host')}"
    elif "id" in job:
        location = f"job {job['id']}" + (f" on {', '.join(job['nodes'])}" if job.get("nodes") else "")
    else:
        location = "no machines yet"
    since = "" if started_at is None else time.strftime(", since %Y-%m-%d %H:%M:%S", time.localtime(float(started_at)))
    return f"attempt {attempt}, {location}, of user {folders.user_name(run.root.stat().st_uid)}{since}"
