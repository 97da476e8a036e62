"""The verbs status and ls: what runs are doing, from their files and their backend's word, for a person or a program."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli import formatting
from launcher.cli.follow import StatusWatch, wandb_words
from launcher.cli.run_summary import summary
from launcher.clusters.base import cluster_for
from launcher.errors import LauncherError, printable
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Status
from launcher.tracking import goodput
from launcher.tracking.metrics import format_duration, status_lines

_BARS = "▁▂▃▄▅▆▇█"
_CLEAR = "\x1b[H\x1b[J"
_ALERTS_SHOWN = 3
_CHECKPOINTS_SHOWN = 5
_ASKED_AT_ONCE = 16
_PARTS_SHOWN = 4
# A newest step that is older is told with its age.
_OLD_S = 60.0
# For so long storage may fail while a run is watched.
_UNREAD_S = 60.0
_COLUMNS = ("run", "state", ">step", ">loss", ">cost", "updated")


def run(verb: str, tokens: list[str]) -> int:
    """Carry out `status` or `ls`."""
    arguments = _parser(verb).parse_args(tokens)
    if verb == "status":
        found = run_store.find_run(arguments.run, Path(arguments.root), marker="status.json")
        return _status(found, arguments.json, arguments.watch)
    if arguments.mirror:
        from launcher.cli import mirror

        return mirror.ls(arguments.mirror, arguments.json)
    return _ls(Path(arguments.root), arguments.json)


def _parser(verb: str) -> argparse.ArgumentParser:
    about = {
        "ls": "List the runs, newest first, or those in a mirror.",
        "status": "Show state, step, loss, pace and cost of a run.",
    }
    parser = argparse.ArgumentParser(prog=f"python -m launcher {verb}", description=about[verb])
    parser.add_argument("--root", default="runs", help="folder of the runs (default: runs)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    if verb == "ls":
        parser.add_argument("mirror", metavar="URL", nargs="?", help="a mirror to list (default: the runs on this machine)")
    else:
        parser.add_argument("run", metavar="RUN", help="name of the run, or path of its directory")
        again = "show it again every so many seconds until the run ends (default: 5)"
        parser.add_argument("--watch", metavar="SECONDS", type=_seconds, nargs="?", const=5.0, help=again)
    return parser


def _seconds(value: str) -> float:
    with suppress(ValueError):
        if 0.1 <= (seconds := float(value)) < 1e6:
            return seconds
    raise argparse.ArgumentTypeError(f"{value} is no number of seconds from 0.1 to a million")


def _status(run: RunDir, as_json: bool, every_s: float | None) -> int:
    """Print the state of a run, once or every `every_s` seconds until it ends."""
    state, read_at = _state_of(run), time.monotonic()
    while True:
        try:
            found = summary(run, state())
        except (OSError, LauncherError) as error:
            # Storage that hiccups is back at the next look.
            if every_s is None or time.monotonic() - read_at > _UNREAD_S:
                raise
            print(printable(f"the run cannot be read now: {_why(error)}"), file=sys.stderr)
            time.sleep(every_s)
            continue
        read_at = time.monotonic()
        block = formatting.as_json(found, 2 if every_s is None else None) if as_json else "\n".join(_lines(found))
        clear = every_s is not None and not as_json and sys.stdout.isatty()
        print(f"{_CLEAR if clear else ''}{block}", flush=True)
        if every_s is None or found["state"] not in RUNNING_STATES:
            return 0
        time.sleep(every_s)
        if not as_json and not clear:
            print()


def _why(error: OSError | LauncherError) -> str:
    return error.problems[0].what if isinstance(error, LauncherError) else str(error)


def _ask(run: RunDir) -> Status:
    return cluster_for(run_store.read_placement(run).kind).status(run)


def _state_of(run: RunDir) -> Callable[[], Status]:
    """What tells the run's state: where no plan names a backend to ask, as with files that were copied, status.json alone."""
    if not run.plan.is_file():
        return partial(run_store.read_status, run)
    return StatusWatch(run, cluster_for(run_store.read_placement(run).kind)).state


def _ls(root: Path, as_json: bool) -> int:
    """Print the runs under `root`, newest first; one that cannot be read is named on standard error."""
    runs, summaries = list(run_store.list_runs(root)), []
    # Backends that do not answer are waited for together.
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        asked = [pool.submit(_ask, run) for run in runs]
    for run, status in zip(runs, asked, strict=True):
        try:
            summaries.append(summary(run, status.result()))
        except (OSError, LauncherError) as error:
            print(printable(f"{run.root.name}: {_why(error)}"), file=sys.stderr)
    if as_json:
        print(formatting.as_json(summaries))
    elif not summaries:
        print(f"no runs under {root}; start one with: python -m launcher")
    else:
        print("\n".join(formatting.table(_COLUMNS, [_row(found) for found in summaries])))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    """The state of a run, a label and a value a line."""
    metrics, asked = found["metrics"], ", asked to stop" if found["asked_to_stop"] else ""
    rows = [
        ("run", f"{found['name']} in {formatting.short(Path(found['dir']))}"),
        ("state", found["state"] + (f": {found['message']}" if found["message"] else "") + asked),
        ("attempt", str(found["attempt"])),
        ("step", _progress(found)),
    ]
    if metrics:
        shown = dict(status_lines(metrics, found["usual"]))
        if "loss" in shown:
            shown["loss"] += f"  {sparkline(found['losses'])}"
        rows += shown.items()
        if found["left_s"] is not None and not asked:
            after = " of training, once it has its machines" if found["state"] == "pending" else ""
            limit = f", until {found['limit']} ends it before its last step" if found["limit"] else ""
            rows.append(("time left", f"{format_duration(found['left_s'])}{after}{limit}"))
    if found["goodput"] is not None:
        rows.append(("goodput", _lost(found["goodput"])))
    if found["cost"] is not None:
        rows.append(("cost", _money(found["cost"], found["device"])))
    if found["eval_loss"] is not None:
        rows.append(("held out", f"loss {found['eval_loss']:.4f} after step {found['eval_step']:,}"))
    if found["checkpoints"]:
        rows.append(("checkpoints", _checkpoints(found["checkpoints"])))
    if page := wandb_words(found["wandb"]):
        rows.append(("W&B", page))
    if found["mirror"] is not None:
        rows.append(("mirror", found["mirror"]))
    rows += [("alert", _alert(alert)) for alert in found["alerts"][-_ALERTS_SHOWN:]]
    # What others have written may be of many lines, and hold what a terminal acts upon.
    return [f"{label:<12}{printable(value).replace(chr(10), chr(10) + ' ' * 12)}" for label, value in rows]


def _progress(found: dict[str, Any]) -> str:
    done, total = found["step"], found["max_steps"]
    is_old = found["state"] in RUNNING_STATES and found["age_s"] is not None and found["age_s"] >= _OLD_S
    age = f", {format_duration(found['age_s'])} ago" if is_old else ""
    return (f"{done:,} of {total:,} ({done / total:.0%})" if total else f"{done:,} of ?") + age


def _checkpoints(steps: Sequence[int]) -> str:
    shown = ", ".join(f"step {step}" for step in steps[-_CHECKPOINTS_SHOWN:])
    more = len(steps) - _CHECKPOINTS_SHOWN
    return f"{shown}, and {more} before" if more > 0 else shown


def sparkline(values: Sequence[float]) -> str:
    """One bar for each value, from the lowest to the highest; one that is not finite is an exclamation mark."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else "!" for value in values)


def _lost(told: dict[str, float]) -> str:
    """The goodput and the largest parts of the rest."""
    parts = sorted(((told[name], words) for name, words in goodput.LOST.items() if told[name] >= 1), reverse=True)
    lost = ", ".join(f"{words} {format_duration(seconds)}" for seconds, words in parts[:_PARTS_SHOWN])
    return f"{told['fraction']:.1%} of {format_duration(told['wall_s'])} went into steps that count" + (
        f"; {lost}" if lost else ""
    )


def _money(cost: dict[str, Any], device: str) -> str:
    hours = f"{cost['gpu_hours']:,.2f} {'GPU' if device == 'cuda' else 'rank'} hours"
    if cost["usd"] is None:
        return hours
    end = f", about ${cost['expected_usd']:,.2f} at the end" if cost["expected_usd"] is not None else ""
    of = "; at a typical price, cluster.price_per_gpu_hour sets yours" if cost["at_typical_price"] else ""
    return f"${cost['usd']:,.2f} so far ({hours}){end}{of}"


def _alert(alert: dict[str, Any]) -> str:
    at = "" if alert["step"] is None else f", step {alert['step']}"
    return f"{alert['text']} ({format_duration(max(0.0, time.time() - alert['time']))} ago{at})"


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    loss, cost = found["metrics"].get("train/loss"), found["cost"] or {}
    about = "~" if cost.get("at_typical_price") else ""
    return (
        found["name"],
        found["state"],
        f"{found['step']}/{found['max_steps'] or '?'}",
        "-" if loss is None else f"{loss:.4f}",
        "-" if cost.get("usd") is None else f"{about}${cost['usd']:,.2f}",
        f"{format_duration(max(0.0, time.time() - found['updated_at']))} ago",
    )
