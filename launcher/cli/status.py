"""The verbs status and ls: what runs are doing, from their files and their backend's word, for a person or a program."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.checkpoint import store
from launcher.cli import text
from launcher.cli.follow import Watch, wandb_page, wandb_words
from launcher.clusters.base import cluster_for
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.run_store import RUNNING_STATES, Placed, Status
from launcher.tracking import goodput
from launcher.tracking.console import format_duration
from launcher.tracking.glance import Glance, glance, newest_step
from launcher.tracking.goodput import Breakdown
from launcher.tracking.jsonl import read_events

_BARS = "▁▂▃▄▅▆▇█"
_CLEAR = "\x1b[H\x1b[J"
_ALERTS_SHOWN = 3
_PARTS_SHOWN = 4
_VARYING = ("perf/tokens_per_sec", "time/step_s", "perf/mfu", "time/straggler_ratio")
_COLUMNS = ("run", "state", ">step", ">loss", ">cost", "updated")


def run(verb: str, tokens: list[str]) -> int:
    """Carry out `status` or `ls`."""
    arguments = _parser(verb).parse_args(tokens)
    if verb == "status":
        found = run_store.find(arguments.run, Path(arguments.root), holding="status.json")
        return _status(found, arguments.json, arguments.watch)
    if arguments.mirror:
        from launcher.cli import fetch

        return fetch.ls(arguments.mirror, arguments.json)
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
    if not 0.1 <= (seconds := float(value)) < 1e6:
        raise ValueError
    return seconds


def _status(run: RunDir, as_json: bool, every_s: float | None) -> int:
    """Print the state of a run, once or every `every_s` seconds until it ends."""
    state = _state_of(run)
    while True:
        found = summary(run, state())
        block = text.as_json(found, 2 if every_s is None else None) if as_json else "\n".join(_lines(found))
        clear = every_s is not None and not as_json and sys.stdout.isatty()
        print(f"{_CLEAR if clear else ''}{block}", flush=True)
        if every_s is None or found["state"] not in RUNNING_STATES:
            return 0
        time.sleep(every_s)
        if not as_json and not clear:
            print()


def _state_of(run: RunDir) -> Callable[[], Status]:
    """What tells the run's state: where no plan names a backend to ask, as with files that were copied, status.json alone."""
    if not run.plan.is_file():
        return partial(run_store.read_status, run)
    return Watch(run, cluster_for(run_store.placed(run).kind)).state


def _ls(root: Path, as_json: bool) -> int:
    """Print the runs under `root`, newest first; one that cannot be read is named on standard error."""
    summaries = []
    for run in run_store.runs(root):
        try:
            status = cluster_for(run_store.placed(run).kind).status(run)
            summaries.append(summary(run, status))
        except LauncherError as error:
            print(f"{run.root.name}: {error.problems[0].what}", file=sys.stderr)
    if as_json:
        print(text.as_json(summaries))
    elif not summaries:
        print(f"no runs under {root}; start one with: python -m launcher")
    else:
        print("\n".join(text.table(_COLUMNS, [_row(found) for found in summaries])))
    return 0


def summary(run: RunDir, status: Status) -> dict[str, Any]:
    """For programs: the state, the newest training step's metrics, and what follows from both; files may be missing."""
    seen = glance(run.metrics)
    # Files that were copied may be without a plan.
    placed = run_store.placed(run) if run.plan.is_file() else None
    checkpoints = store.list_checkpoints(run.checkpoints)
    events = read_events(run.events)
    spent = _spent(run, status)
    return {
        "name": run.root.name,
        "dir": str(run.root),
        **asdict(status),
        "step": newest_step(run, status),
        "metrics": seen.last,
        "usual": _usual(seen.recent),
        "losses": list(seen.losses),
        "eval_loss": seen.eval_loss,
        "eval_step": seen.eval_step,
        "left_s": _left_s(seen, status),
        "asked_to_stop": status.state in RUNNING_STATES and run.cancel(status.attempt).is_file(),
        "checkpoints": [checkpoint.step for checkpoint in checkpoints],
        "device": placed.device if placed is not None else "cuda",
        "cost": _cost(seen, spent, placed, status),
        "goodput": _goodput(spent or goodput.of_metrics(seen.last)),
        "alerts": [{"time": e["time"], "step": e["step"], "text": e["text"]} for e in events if e["kind"] == "alert"],
        "wandb": wandb_page(events),
        "mirror": next((e["text"] for e in reversed(events) if e["kind"] == "mirror"), None),
    }


def _left_s(seen: Glance, status: Status) -> float | None:
    """Seconds until the end of a run that goes on, by its newest training step; None where that cannot be told."""
    if status.state not in RUNNING_STATES or not seen.last:
        return None
    left = seen.last.get("trainer/eta_s", math.nan)
    if seen.last["attempt"] != status.attempt and status.max_steps:
        # An attempt that has not trained yet may have more steps to go than the one before.
        left = (status.max_steps - seen.last["trainer/step"]) * _usual(seen.recent).get("time/step_s", math.nan)
    return left if math.isfinite(left) else None


def _num_ranks(line: dict[str, Any]) -> int | None:
    """The ranks that a line of metrics is of; None where it does not tell."""
    whole, each = line.get("perf/tokens_per_sec"), line.get("perf/tokens_per_sec_per_gpu")
    return round(whole / each) if whole and each else None


def _usual(recent: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the newest steps, of what varies from step to step."""
    values = {name: [line[name] for line in recent if name in line] for name in _VARYING}
    return {name: statistics.median(found) for name, found in values.items() if found}


def _spent(run: RunDir, status: Status) -> Breakdown | None:
    """Where the time went until now, or until the run's end; None where its files do not tell."""
    with suppress(LauncherError, OSError, KeyError, TypeError, ValueError):
        return goodput.read(run, time.time(), status.state) if run_store.attempt_numbers(run) else None
    return None


def _goodput(told: Breakdown | None) -> dict[str, float] | None:
    """The time since submission and its parts in seconds; None before there is any."""
    if told is None or not told.kept_s:
        return None
    lost = {name: getattr(told, name) for name in goodput.LOST}
    return {"fraction": told.goodput, "wall_s": told.wall_s, "kept_s": told.kept_s, **lost, "lost_steps": told.lost_steps}


def _cost(seen: Glance, spent: Breakdown | None, placed: Placed | None, status: Status) -> dict[str, Any] | None:
    """GPU hours and dollars so far, and the dollars at the end where that can be told; None where nothing is counted.

    Where the files of the attempts do not tell, the newest line of metrics that counts does. `at_typical_price` is None without a
    plan.
    """
    counted, price = seen.spent, None if placed is None else placed.price
    typical = None if placed is None else price is not None and price.assumption is not None
    if spent is not None and spent.gpu_s and placed is not None:
        if placed.device == "cpu" and price is None:
            return None
        hours, usd, typical = spent.gpu_s / 3600, spent.usd, spent.assumed_usd > 0
    elif counted is not None:
        hours, usd = counted.gpu_hours, counted.usd
    else:
        return None
    expected = _expected(seen, spent, placed, hours, usd, _left_s(seen, status))
    return {"gpu_hours": hours, "usd": usd, "expected_usd": expected, "at_typical_price": typical}


def _expected(
    seen: Glance,
    spent: Breakdown | None,
    placed: Placed | None,
    hours: float,
    usd: float | None,
    left_s: float | None,
) -> float | None:
    """Dollars at the end, which is `left_s` away; None where it cannot be told."""
    if usd is None or seen.spent is None or left_s is None:
        return None
    num_gpus, price = _num_ranks(seen.last), usd / hours if hours else None
    if placed is not None:
        num_gpus = max(placed.num_ranks, 0 if spent is None else spent.num_workers)
        price = None if placed.price is None else placed.price.usd_per_gpu_hour
    if num_gpus is None or price is None:
        return None
    return usd + price * max(0.0, seen.spent.gpu_hours + num_gpus * left_s / 3600 - hours)


def _lines(found: dict[str, Any]) -> list[str]:
    """The state of a run, a label and a value a line."""
    metrics, asked = found["metrics"], ", asked to stop" if found["asked_to_stop"] else ""
    rows = [
        ("run", f"{found['name']} in {text.short(Path(found['dir']))}"),
        ("state", found["state"] + (f": {found['message']}" if found["message"] else "") + asked),
        ("attempt", str(found["attempt"])),
        ("step", _progress(found)),
    ]
    if metrics:
        rows.append(("loss", f"{metrics['train/loss']:.4f}  {sparkline(found['losses'])}"))
        rows.append(("pace", _pace(found["usual"])))
        rows.append(("memory", _memory(metrics)))
        rows += [(label, words) for label, words in (("GPUs", _gpus(metrics)), ("ranks", _ranks(found["usual"]))) if words]
        if found["left_s"] is not None and not asked:
            rows.append(("time left", format_duration(found["left_s"])))
    if found["goodput"] is not None:
        rows.append(("goodput", _lost(found["goodput"])))
    if found["cost"] is not None:
        rows.append(("cost", _money(found["cost"], found["device"])))
    if found["eval_loss"] is not None:
        rows.append(("held out", f"loss {found['eval_loss']:.4f} after step {found['eval_step']:,}"))
    if found["checkpoints"]:
        rows.append(("checkpoints", ", ".join(f"step {step}" for step in found["checkpoints"])))
    if page := wandb_words(found["wandb"]):
        rows.append(("W&B", page))
    if found["mirror"] is not None:
        rows.append(("mirror", found["mirror"]))
    rows += [("alert", _alert(alert)) for alert in found["alerts"][-_ALERTS_SHOWN:]]
    return [f"{label:<12}{value}" for label, value in rows]


def _progress(found: dict[str, Any]) -> str:
    done, total = found["step"], found["max_steps"]
    return f"{done:,} of {total:,} ({done / total:.0%})" if total else f"{done:,} of ?"


def sparkline(values: Sequence[float]) -> str:
    """One bar for each value, from the lowest to the highest; one that is not finite is an exclamation mark."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else "!" for value in values)


def _pace(usual: dict[str, float]) -> str:
    pace = f"{usual['perf/tokens_per_sec']:,.0f} tokens/s, {usual['time/step_s']:.2f} s a step"
    return pace + (f", MFU {usual['perf/mfu']:.1%}" if "perf/mfu" in usual else "")


def _memory(metrics: dict[str, Any]) -> str:
    host = f"{metrics['memory/host_rss_gib']:.1f} GiB of main memory in rank 0"
    reserved = metrics.get("memory/peak_reserved_gib")
    return host if reserved is None else f"{reserved:.1f} GiB of the GPU reserved at the peak, {host}"


def _gpus(metrics: dict[str, Any]) -> str:
    parts = []
    if "gpu/util_mean" in metrics:
        parts.append(f"{metrics['gpu/util_mean']:.0%} busy (the least {metrics['gpu/util_min']:.0%})")
    if "gpu/memory_max_frac" in metrics:
        parts.append(f"memory up to {metrics['gpu/memory_max_frac']:.0%}")
    if "gpu/power_mean" in metrics:
        parts.append(f"{metrics['gpu/power_mean']:,.0f} W each")
    if "gpu/temp_max" in metrics:
        parts.append(f"up to {metrics['gpu/temp_max']:.0f} °C")
    if metrics.get("gpu/xids"):
        parts.append(f"{metrics['gpu/xids']:.0f} Xid errors")
    return ", ".join(parts)


def _ranks(usual: dict[str, float]) -> str:
    if "time/straggler_ratio" not in usual:
        return ""
    return f"the slowest works {usual['time/straggler_ratio']:.2f} times as long as the usual one"


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
