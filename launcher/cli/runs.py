"""The verbs on runs that exist: ls, status, logs, cancel, resume, export."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.checkpoint import hub, store
from launcher.cli import text
from launcher.cli.follow import Watch, follow
from launcher.cli.launch import worker_environment
from launcher.cli.resume import start_again
from launcher.clusters.base import cluster_for
from launcher.config.fields import HUB_ID_PATTERN
from launcher.errors import LauncherError, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.run_store import RUNNING_STATES, Status
from launcher.tracking.console import format_duration
from launcher.tracking.jsonl import read_events, read_metrics

_FOLLOW_S = 0.3


def run(verb: str, tokens: list[str]) -> int:
    arguments = _parser(verb).parse_intermixed_args(tokens)
    if verb == "ls":
        return _ls_mirror(arguments) if arguments.mirror else _ls(arguments)
    if verb == "resume" and "://" in arguments.run:
        from launcher.cli import fetch

        return _resume(fetch.run_from(arguments.run, Path(arguments.root), arguments.step), arguments)
    found = run_store.find(arguments.run, Path(arguments.root))
    return {"status": _status, "logs": _logs, "cancel": _cancel, "resume": _resume, "export": _export}[verb](found, arguments)


def _parser(verb: str) -> argparse.ArgumentParser:
    about = {
        "ls": "List the runs, newest first, or those in a mirror.",
        "status": "Show state, step, loss and pace of a run.",
        "logs": "Show what a rank printed.",
        "cancel": "Ask a run to save and stop; a second time, kill it.",
        "resume": "Continue a run from its newest checkpoint.",
        "export": "Write a checkpoint as a Hugging Face folder and compare it with the trained model.",
    }[verb]
    parser = argparse.ArgumentParser(prog=f"python -m launcher {verb}", description=about)
    parser.add_argument("--root", default="runs", help="folder of the runs (default: runs)")
    if verb == "ls":
        parser.add_argument("mirror", metavar="URL", nargs="?", help="a mirror to list (default: the runs on this machine)")
    else:
        address = "; resume: also its address in a mirror, URL/NAME" if verb == "resume" else ""
        parser.add_argument("run", metavar="RUN", help=f"name of the run, or path of its directory{address}")
    if verb in ("ls", "status"):
        parser.add_argument("--json", action="store_true", help="print JSON")
    if verb == "logs":
        parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
        parser.add_argument("--rank", type=int, default=0, help="which rank (default: 0)")
        parser.add_argument("--attempt", type=int, help="which attempt (default: the last)")
    if verb == "cancel":
        save = "save a checkpoint first, which is the default; asked a second time it stops at once"
        parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help=save)
    if verb == "resume":
        parser.add_argument("overrides", nargs="*", help="settings to change, such as train.max_steps=2000")
        follow = "show it to its end, or return at once (default: follow on this machine, return on a cluster)"
        parser.add_argument("--follow", action="store_true", default=None, help=follow)
        parser.add_argument("--detach", dest="follow", action="store_false", help="return at once")
        force = "continue with data and settings that differ from those of the checkpoint; they are listed without it"
        parser.add_argument("--force", action="store_true", help=force)
        parser.add_argument("--step", type=int, help="go back to the checkpoint of this step; later ones are set aside")
    if verb == "export":
        parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
        parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="type of the weights (default: bf16)")
        parser.add_argument("--out", help="folder to write (default: export/ in the run directory)")
        parser.add_argument("--no-check", action="store_true", help="do not load the folder with transformers to prove it")
        parser.add_argument("--push", metavar="OWNER/NAME", help="repository of the Hub that gets the folder; needs HF_TOKEN")
    return parser


def _summary(run: RunDir) -> dict[str, Any]:
    """status.json corrected by the backend, and the newest metrics."""
    plan = run_store.load_plan(run)
    status: Status = cluster_for(plan.config.cluster.kind).status(run)
    logged = read_metrics(run.metrics)
    last: dict[str, Any] = next((m for m in reversed(logged) if "train/loss" in m), {})
    evals = [m for m in logged if "eval/held_out/loss" in m]
    return {
        "name": run.root.name,
        "dir": str(run.root),
        **asdict(status),
        "metrics": last,
        "eval_loss": evals[-1]["eval/held_out/loss"] if evals else None,
        "checkpoints": [c.step for c in store.list_checkpoints(run.checkpoints)],
    }


def _ls(arguments: argparse.Namespace) -> int:
    summaries, unreadable = [], []
    for found in run_store.runs(Path(arguments.root)):
        try:
            summaries.append(_summary(found))
        except LauncherError as error:
            unreadable.append(f"{found.root.name}: {error.problems[0].what}")
    if arguments.json:
        print(json.dumps(summaries, indent=2))
        return 0
    for line in unreadable:
        print(line, file=sys.stderr)
    if not summaries:
        print(f"no runs under {arguments.root}; start one with: python -m launcher")
        return 0
    width = max(len(s["name"]) for s in summaries)
    print(f"{'run':<{width}}  {'state':<10} {'step':>13}  {'loss':>7}  updated")
    for s in summaries:
        steps = f"{s['step']}/{s['max_steps'] or '?'}"
        loss = s["metrics"].get("train/loss")
        shown = f"{loss:7.4f}" if loss is not None else "      -"
        print(
            f"{s['name']:<{width}}  {s['state']:<10} {steps:>13}  {shown}  {format_duration(time.time() - s['updated_at'])} ago"
        )
    return 0


def _ls_mirror(arguments: argparse.Namespace) -> int:
    from launcher.cli import fetch

    return fetch.ls(arguments.mirror, arguments.json)


def _status(run: RunDir, arguments: argparse.Namespace) -> int:
    summary = _summary(run)
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return 0
    metrics = summary["metrics"]
    rows = [
        ("run", f"{summary['name']} in {text.short(run.root)}"),
        ("state", summary["state"] + (f": {summary['message']}" if summary["message"] else "")),
        ("attempt", str(summary["attempt"])),
        ("step", f"{summary['step']} of {summary['max_steps'] or '?'}"),
    ]
    if metrics:
        rows.append(("loss", f"{metrics['train/loss']:.4f}"))
        rows.append(("pace", f"{metrics['perf/tokens_per_sec']:,.0f} tokens/s, {metrics['time/step_s']:.2f} s a step"))
        if summary["state"] in RUNNING_STATES:
            rows.append(("time left", format_duration(metrics["trainer/eta_s"])))
    if summary["eval_loss"] is not None:
        rows.append(("held out", f"loss {summary['eval_loss']:.4f}"))
    if summary["checkpoints"]:
        rows.append(("checkpoints", ", ".join(f"step {step}" for step in summary["checkpoints"])))
    page: dict[str, Any] = next(
        (e["fields"] for e in reversed(read_events(run.events)) if {"url", "sync_command"} & e["fields"].keys()), {}
    )
    rows += [("W&B", page.get("url") or f"offline; upload it with: {page['sync_command']}")] if page else []
    mirrored = [event["text"] for event in read_events(run.events) if event["kind"] == "mirror"]
    rows += [("mirror", mirrored[-1])] if mirrored else []
    alerts = [event["text"] for event in read_events(run.events) if event["kind"] == "alert"]
    rows += [("alert", alert) for alert in alerts[-3:]]
    print("\n".join(f"{label:<12}{value}" for label, value in rows))
    return 0


def _logs(run: RunDir, arguments: argparse.Namespace) -> int:
    attempt = arguments.attempt or run_store.newest_attempt(run)
    if not run.rank_log(attempt, arguments.rank).is_file() and not arguments.follow:
        there = sorted(p.name for p in run.attempt(attempt).glob("*.log")) if run.attempt(attempt).is_dir() else []
        raise SubmitError(
            f"rank {arguments.rank} has no log in attempt {attempt}",
            where=str(run.rank_log(attempt, arguments.rank)),
            remedy=f"there are: {', '.join(there)}" if there else "the attempt has not started",
        )
    watch = Watch(run, cluster_for(run_store.load_plan(run).config.cluster.kind))
    offset = 0
    while True:
        running = watch.state().state in RUNNING_STATES
        offset = _print_from(run.rank_log(attempt, arguments.rank), offset)
        if not arguments.follow or not running:
            break
        newest = run_store.newest_attempt(run)
        if arguments.attempt is None and newest != attempt:
            # What the attempt before wrote last is shown before the next one's log.
            _print_from(run.rank_log(attempt, arguments.rank), offset)
            attempt, offset = newest, 0
        time.sleep(_FOLLOW_S)
    agent = run.attempt(attempt) / "agent.log"
    if not run.rank_log(attempt, arguments.rank).is_file() and agent.is_file():
        print(agent.read_text(errors="replace"), end="")
    return 0


def _print_from(log: Path, offset: int) -> int:
    """Print what a log holds from `offset` on and return where it ends."""
    if not log.is_file():
        return offset
    with open(log, "rb") as file:
        file.seek(offset)
        data = file.read()
    sys.stdout.write(data.decode(errors="replace"))
    sys.stdout.flush()
    return offset + len(data)


def _cancel(run: RunDir, arguments: argparse.Namespace) -> int:
    cluster_for(run_store.load_plan(run).config.cluster.kind).cancel(run, save=arguments.save)
    asked = "asked to save and stop" if arguments.save else "asked to stop at once"
    print(f"{asked}; watch it: python -m launcher status {text.short(run.root)}")
    return 0


def _resume(run: RunDir, arguments: argparse.Namespace) -> int:
    plan = run_store.load_plan(run)
    cluster = cluster_for(plan.config.cluster.kind)
    with run_store.starting(run):
        attempt = start_again(run, plan, cluster, arguments.overrides, arguments.step, arguments.force)
    if arguments.follow if arguments.follow is not None else plan.config.cluster.is_followed:
        return follow(run, attempt, cluster)
    print("\n".join(text.started_lines(plan, cluster.started(run, attempt))))
    return 0


def _export(run: RunDir, arguments: argparse.Namespace) -> int:
    if arguments.push is not None:
        _require_pushable(arguments.push)
    command = [sys.executable, "-m", "launcher.worker.export", str(run.plan)]
    for flag in ("step", "dtype", "out", "push"):
        value = getattr(arguments, flag)
        if value is not None:
            command += [f"--{flag}", str(value)]
    command += ["--no-check"] if arguments.no_check else []
    return subprocess.run(command, env=worker_environment()).returncode


def _require_pushable(repo_id: str) -> None:
    """Refuse a push that cannot succeed before the export that it follows."""
    if not HUB_ID_PATTERN.fullmatch(repo_id):
        raise SubmitError("this is not a repository of the Hub", where="--push", value=repo_id, remedy="write owner/name")
    if problem := hub.token_problem("--push", repo_id):
        raise SubmitError(problem)
