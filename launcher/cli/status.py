"""The verbs status and ls: the state of runs from their files and backends, as text or JSON."""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli import formatting
from launcher.cli.follow import StatusWatch, wandb_words
from launcher.cli.verbs import DEFAULT_ROOT
from launcher.cli.views.run_summary import summary
from launcher.clusters.backends import StatusReader, status_reader_for
from launcher.errors import LauncherError, SubmitError, printable
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.security.printable_stream import raw
from launcher.shell_commands import launcher_command
from launcher.tracking import goodput
from launcher.tracking.metrics import format_duration, status_lines

_LABEL_WIDTH = 12
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
_COLUMNS = ("run", "state", ">step", ">loss", ">cost", "updated")


def show_run(arguments: argparse.Namespace) -> int:
    """Print the state of a run, once or, with --watch, every few seconds until it ends."""
    run, as_json, every_s = run_store.find_run(arguments.run, Path(arguments.root)), arguments.json, arguments.watch
    watch, read_at = StatusWatch(run, _find_reader(run)), time.monotonic()
    while True:
        try:
            values = summary(run, watch.state())
        except (OSError, LauncherError) as error:
            # Storage may be available again at the next try.
            if every_s is None or time.monotonic() - read_at > _STORAGE_FAILURE_S:
                raise
            print(printable(f"the run cannot be read now: {_reason(error)}"), file=sys.stderr)
            time.sleep(every_s)
            continue
        read_at = time.monotonic()
        block = formatting.as_json(values, 2 if every_s is None else None) if as_json else "\n".join(_lines(values))
        clear = every_s is not None and not as_json and sys.stdout.isatty()
        if clear:
            raw(sys.stdout).write(_CLEAR)
        print(block, flush=True)
        if every_s is None or values["state"] not in RUNNING_STATES:
            return 0
        time.sleep(every_s)
        if not as_json and not clear:
            print()


def list_runs(arguments: argparse.Namespace) -> int:
    """Print the runs of a folder, newest first, or those of a mirror; name unreadable runs on standard error."""
    if arguments.mirror:
        if "://" not in arguments.mirror:
            raise _folder_error(arguments.mirror)
        from launcher.cli import mirror

        return mirror.ls(arguments.mirror, arguments.json)
    root = Path(arguments.root)
    _require_folder(root)
    runs = list(run_store.list_runs(root))
    summaries: list[str] = []
    rows: list[tuple[str, ...]] = []
    # Wait for slow backends at the same time.
    with ThreadPoolExecutor(_NUM_QUERIES) as pool:
        answers = [pool.submit(lambda run: _find_reader(run).status(run), run) for run in runs]
    for run, answer in zip(runs, answers, strict=True):
        try:
            values = summary(run, answer.result())
            if arguments.json:
                summaries.append(textwrap.indent(formatting.as_json(values), "  "))
            else:
                rows.append(_row(values))
        except Exception as error:
            # One run must not hide the others.
            print(printable(f"{run.root.name}: {_reason(error)}").replace("\n", "\\n"), file=sys.stderr)
    if arguments.json:
        print("[\n{}\n]".format(",\n".join(summaries)) if summaries else "[]")
    elif not rows:
        print(f"no runs under {root}; start one with: python -m launcher train; --root names another folder")
    else:
        print("\n".join(formatting.table(_COLUMNS, rows)))
    return 0


def _folder_error(folder: str) -> SubmitError:
    """Return the error for a folder where the URL of a mirror is expected."""
    is_run = any((Path(above) / folder / "status.json").is_file() for above in ("", DEFAULT_ROOT))
    command = launcher_command("status", folder) if is_run else launcher_command("ls", "--root", folder)
    remedy = f"show {'this run' if is_run else 'the runs in this folder'} with: {command}"
    return SubmitError(
        "ls takes the URL of a mirror, such as s3://bucket/runs", where="command line", value=folder, remedy=remedy
    )


def _reason(error: Exception) -> str:
    return error.problems[0].message if isinstance(error, LauncherError) else str(error)


def _find_reader(run: RunDir) -> StatusReader:
    return status_reader_for(run, run_store.read_placement(run).kind)


def _require_folder(root: Path) -> None:
    """Reject a folder of runs that is missing (except the default, which the first run creates) or that is itself a run.

    Raises:
        SubmitError: with the folder.
    """
    if (root / "status.json").is_file():
        remedy = f"show this run with: {launcher_command('status', root)}"
        raise SubmitError("this is the directory of a run, not a folder of runs", where="--root", value=str(root), remedy=remedy)
    if not root.is_dir() and str(root) != DEFAULT_ROOT:
        raise SubmitError("there is no such folder", where="--root", value=str(root), remedy="name the folder of the runs")


def _lines(values: dict[str, Any]) -> list[str]:
    """Return the state of a run as lines of a label and a value."""
    metrics, stop_note = values["metrics"], ", stop requested" if values["asked_to_stop"] else ""
    rows = [
        ("run", f"{values['name']} in {formatting.short(Path(values['dir']))}"),
        ("state", values["state"] + (f": {values['message']}" if values["message"] else "") + stop_note),
        ("attempt", str(values["attempt"])),
        ("step", _progress(values)),
    ]
    if values["progress"] is not None:
        age = format_duration(max(0.0, time.time() - values["progress"]["time"]))
        rows.append(("progress", f"{values['progress']['text']} ({age} ago)"))
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
    if values["goodput"] is not None:
        rows.append(("goodput", _goodput(values["goodput"])))
    if values["cost"] is not None:
        rows.append(("cost", _money(values["cost"], values["device"])))
    if values["eval_loss"] is not None:
        rows.append(("held out", f"loss {values['eval_loss']:.4f} after step {values['eval_step']:,}"))
    if values["checkpoints"]:
        rows.append(("checkpoints", _checkpoints(values["checkpoints"])))
    if values["export"] is not None:
        of_step = values["export_step"]
        is_newest = of_step is None or of_step in values["checkpoints"][-1:]
        rows.append(("export", formatting.short(Path(values["export"])) + ("" if is_newest else f" (step {of_step:,})")))
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
        rows.append(("alert", f"{alert['text']} ({format_duration(max(0.0, time.time() - alert['time']))} ago{at})"))
    # Texts from other programs may contain line breaks and control characters.
    lines = [f"{label:<{_LABEL_WIDTH}}{printable(value).replace(chr(10), chr(10) + ' ' * _LABEL_WIDTH)}" for label, value in rows]
    return formatting.wrap([line for text in lines for line in text.split("\n")], _LABEL_WIDTH)


def _progress(values: dict[str, Any]) -> str:
    done, total = values["step"], values["max_steps"]
    is_old = values["state"] in RUNNING_STATES and values["age_s"] is not None and values["age_s"] >= _STALE_STEP_S
    age = f", {format_duration(values['age_s'])} ago" if is_old else ""
    return (f"{done:,} of {total:,} ({done / total:.0%})" if total else f"{done:,} of ?") + age


def _checkpoints(steps: Sequence[int]) -> str:
    shown = ", ".join(f"step {step}" for step in steps[-_CHECKPOINTS_SHOWN:])
    more = len(steps) - _CHECKPOINTS_SHOWN
    return f"{shown}, and {more} older" if more > 0 else shown


def sparkline(values: Sequence[float]) -> str:
    """Return one bar for each value, scaled from lowest to highest; an exclamation mark for non-finite values."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else "!" for value in values)


def _goodput(seconds_of: dict[str, float]) -> str:
    """Return the goodput and the largest parts of the lost time."""
    parts = sorted(((seconds_of[name], label) for name, label in goodput.LOST.items() if seconds_of[name] >= 1), reverse=True)
    lost = ", ".join(f"{label} {format_duration(seconds)}" for seconds, label in parts[:_PARTS_SHOWN])
    return f"{seconds_of['fraction']:.1%} of {format_duration(seconds_of['wall_s'])} was spent on kept steps" + (
        f"; {lost}" if lost else ""
    )


def _money(cost: dict[str, Any], device: str) -> str:
    hours = f"{cost['gpu_hours']:,.2f} {'GPU' if device == 'cuda' else 'rank'} hours"
    if cost["usd"] is None:
        return hours
    end = f", about ${cost['expected_usd']:,.2f} at the end" if cost["expected_usd"] is not None else ""
    of = "; at a typical price; set yours with cluster.price_per_gpu_hour" if cost["at_typical_price"] else ""
    return f"${cost['usd']:,.2f} so far ({hours}){end}{of}"


def _row(values: dict[str, Any]) -> tuple[str, ...]:
    loss, cost = values["metrics"].get("train/loss"), values["cost"] or {}
    about = "~" if cost.get("at_typical_price") else ""
    return (
        printable(values["name"]),
        values["state"],
        f"{values['step']:,}/{values['max_steps']:,}" if values["max_steps"] else f"{values['step']:,}/?",
        "-" if loss is None else f"{loss:.4f}",
        "-" if cost.get("usd") is None else f"{about}${cost['usd']:,.2f}",
        f"{format_duration(max(0.0, time.time() - values['updated_at']))} ago",
    )
