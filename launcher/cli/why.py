"""The verb why: explain a step of a run with its rows, their losses under the checkpoint before it, and nearby events."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli.render import terminal
from launcher.cli.render.sections import Items, Part, Section, Table, Text
from launcher.cli.worker_process import run_reporting
from launcher.errors import SubmitError
from launcher.security import owners
from launcher.tracking.jsonl import read_events, read_metrics

# Number of steps on either side to show loss and gradient norm for, and seconds within which events count as nearby.
_STEPS_AROUND = 3
_NEAR_S = 600.0
_METRICS = ("train/loss", "train/grad_norm", "train/lr")
_MAX_DOCUMENTS, _MIN_CHARS, _MAX_CHARS = 12, 20, 60
# Characters of a line beside an answer, if the document has a line of its own.
_OTHER_COLUMNS = 54
_COLUMNS = ("document", "source", "row", "trained", "loss", "worst token", "answer")


def explain_step(arguments: argparse.Namespace) -> int:
    """Show a step's rows, with their losses under the checkpoint before it, computed on this machine."""
    run_dir = run_store.find_run(arguments.run, Path(arguments.root))
    owners.require_run(run_dir.root)
    trained = [line for line in read_metrics(run_dir.metrics, _METRICS) if "train/loss" in line]
    line = min(trained, key=lambda one: abs(one["trainer/step"] - arguments.step), default=None)
    if line is None or line["trainer/step"] != arguments.step:
        logged = f"{trained[0]['trainer/step']} to {trained[-1]['trainer/step']}" if trained else "none"
        remedy = "" if line is None else f"choose a logged step, such as {line['trainer/step']}"
        value = f"step {arguments.step}; it has logged {logged}"
        raise SubmitError("the run has no such step", where=str(run_dir.metrics), value=value, remedy=remedy)
    near = [
        {"step": one["trainer/step"], **{name: one.get(name) for name in _METRICS}}
        for one in trained
        if abs(one["trainer/step"] - arguments.step) <= _STEPS_AROUND
    ]
    # A resume may have changed settings before the attempt.
    changed = [path for path in run_store.changed_plan_paths(run_dir) if int(path.parent.name) <= line["attempt"]]
    options = ["--rows-of", str(arguments.step), *(["--no-scores"] if arguments.no_scores else [])]
    if not arguments.no_scores:
        print(f"computing the losses of the rows of step {arguments.step}, for which the model is loaded", file=sys.stderr)
    report = run_reporting("launcher.evaluate.documents_report", None, str([run_dir.plan, *changed][-1]), *options)
    events = [
        {key: event.get(key) for key in ("time", "attempt", "step", "kind", "text")}
        for event in read_events(run_dir.events)
        if event.get("kind") == "alert" and abs(event.get("time", 0.0) - line["time"]) <= _NEAR_S
    ]
    report |= {"run": run_dir.root.name, "steps": near, "events": events}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        terminal.show(*to_sections(report))
    return 0


def to_sections(report: dict[str, Any]) -> list[Part]:
    """Return what is shown of a step."""
    num_documents = sum(len(row["documents"]) for row in report["rows"])
    steps = [
        (f"{one['step']}{' <' if one['step'] == report['step'] else ''}", *(_format_number(one[name]) for name in _METRICS))
        for one in report["steps"]
    ]
    if report["scored_at"] is None:
        about = f"no losses of documents{': ' if report['not_scored'] else ''}{report['not_scored']}"
    else:
        before = "the initial weights" if report["scored_at"] == 0 else f"the weights of step {report['scored_at']}"
        about = f"losses under {before}; the documents with the largest share of the loss first"
    documents = [(row["row"], one) for row in report["rows"] for one in row["documents"]]
    documents.sort(key=lambda pair: -(pair[1]["loss"] or 0.0) * pair[1]["trained_tokens"])
    width = terminal.columns() or _OTHER_COLUMNS + _MAX_CHARS
    num_chars, rows = max(_MIN_CHARS, min(_MAX_CHARS, width - _OTHER_COLUMNS)), []
    for row, one in documents[:_MAX_DOCUMENTS]:
        answer = " ".join(one["answer"].split())
        losses = (_format_number(one["loss"]), _format_number(one["max_token_loss"]))
        shortened = answer if len(answer) <= num_chars else f"{answer[:num_chars]}..."
        rows.append((one["where"], one["source"], f"{row}", f"{one['trained_tokens']:,}", *losses, shortened))
    more = [f"and {num_documents - _MAX_DOCUMENTS:,} more: --json lists all"] if num_documents > _MAX_DOCUMENTS else []
    events = []
    for event in report["events"]:
        clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        step = "" if event["step"] is None else f" step {event['step']}"
        events.append(f"{clock}{step}: {event['text']}")
    return [
        Text(f"step {report['step']} of {report['run']}: {num_documents:,} documents in {len(report['rows']):,} rows"),
        Section("", [Table(("step", "loss", "gradient norm", "learning rate"), steps, numbers=range(1, 4))]),
        Section("", [Text(about), Table(_COLUMNS, rows, numbers=range(2, 6)), Items(more)]),
        Section("alerts, faults and restarts within 10 minutes", [Items(events or ["none"])]),
    ]


def _format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.4g}"
