"""The verbs that explain, by losses of documents: `why` a step, `data --scored` the data, `drift` the prompts of today."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.cli.render import html, terminal
from launcher.cli.render.sections import Commands, Items, MarkedText, Part, Section, Table, Text
from launcher.cli.worker_process import run_reporting
from launcher.data.triage import FINDINGS, MISLABELED, write_exclusions
from launcher.errors import EXIT_CHECK_FAILED, ConfigError, DataError, SubmitError
from launcher.runs import run_store
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking.jsonl import read_events, read_metrics

_DOCUMENTS_REPORT = "launcher.evaluate.documents_report"
# Characters of an answer in a table.
_MAX_CHARS = 60
# Number of steps on either side to show loss and gradient norm for, and seconds within which events count as nearby.
_STEPS_AROUND, _NEAR_S = 3, 600.0
_METRICS = ("train/loss", "train/grad_norm", "train/lr")
_MAX_DOCUMENTS = 12
_STEP_COLUMNS = ("document", "source", "row", "trained", "loss", "worst token", "answer")
# Number of documents per list on the page of `data --scored`.
_MOST_ON_PAGE = 100
# If a larger share looks mislabeled, the model lacks knowledge: data with that many wrong labels would teach nothing.
_MOST_LIKELY = 0.5
_RANKING_COLUMNS = ("document", "source", "tokens", "loss", "without prompt", "explained", "answer")
_NUMBERS = range(2, 6)
_ABOUT_TEXTS = (
    "Losses are in nats a token. The marked text is trained: its beginning, after the end of the prompt. Keys, passwords, e-mail "
    "addresses and telephone numbers are left out here."
)


def explain_step(arguments: argparse.Namespace) -> int:
    """Show a step's rows, with their losses under the checkpoint before it, computed on this machine."""
    run_dir = run_store.find_own_run(arguments.run, arguments.root)
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
    report = run_reporting(_DOCUMENTS_REPORT, None, str([run_dir.plan, *changed][-1]), *options)
    events = [
        {key: event.get(key) for key in ("time", "attempt", "step", "kind", "text")}
        for event in read_events(run_dir.events)
        if event.get("kind") == "alert" and abs(event.get("time", 0.0) - line["time"]) <= _NEAR_S
    ]
    report |= {"run": run_dir.root.name, "steps": near, "events": events}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        terminal.show(*show_step(report))
    return 0


def show_step(report: dict[str, Any]) -> list[Part]:
    """Return what `why` shows, from the answer of launcher.evaluate.documents_report."""
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
    rows = [
        (
            one["where"],
            one["source"],
            str(row),
            f"{one['trained_tokens']:,}",
            _format_number(one["loss"]),
            _format_number(one["max_token_loss"]),
            _shorten(one["answer"]),
        )
        for row, one in documents[:_MAX_DOCUMENTS]
    ]
    more = [f"and {num_documents - _MAX_DOCUMENTS:,} more: --json lists all"] if num_documents > _MAX_DOCUMENTS else []
    events = []
    for event in report["events"]:
        clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        step = "" if event["step"] is None else f" step {event['step']}"
        events.append(f"{clock}{step}: {event['text']}")
    return [
        Text(f"step {report['step']} of {report['run']}: {num_documents:,} documents in {len(report['rows']):,} rows"),
        Section("", [Table(("step", "loss", "gradient norm", "learning rate"), steps, numbers=range(1, 4))]),
        Section("", [Text(about), Table(_STEP_COLUMNS, rows, _NUMBERS), Items(more)]),
        Section("alerts, faults and restarts within 10 minutes", [Items(events or ["none"])]),
    ]


def _format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.4g}"


def _shorten(answer: str) -> str:
    """Return the beginning of an answer, on one line."""
    line = " ".join(answer.split())
    return line if len(line) <= _MAX_CHARS else f"{line[:_MAX_CHARS]}..."


def rank_documents(arguments: argparse.Namespace) -> int:
    """Score unscored documents, and show which are likely mislabeled, memorized, or have nothing to learn."""
    run_dir = run_store.find_own_run(arguments.scored, arguments.root)
    page = None if arguments.html is None else html.require_writable_page(arguments.html)
    exclude = arguments.exclude
    if exclude is not None and (exclude.exists() or not exclude.absolute().parent.is_dir()):
        raise ConfigError("the file exists already, or its folder does not", where="--exclude", value=str(exclude))
    options = ["--split", arguments.split, *([] if arguments.step is None else ["--step", str(arguments.step)])]
    report = run_reporting(_DOCUMENTS_REPORT, None, str(run_dir.plan), *options)
    if exclude is not None:
        # From the ranking of mislabeled documents, only likely ones.
        chosen = [
            {key: entry[key] for key in ("content", "where", "loss", "loss_alone")} | {"finding": name}
            for name in arguments.finding or [MISLABELED]
            for entry in report["lists"][name]
            if entry.get("likely", True)
        ]
        write_exclusions(exclude, {entry["content"]: entry for entry in chosen}.values())
    if page is not None:
        parts: list[Part] = [*_find_caution(report), Text(_ABOUT_TEXTS, "soft")]
        for name, title in FINDINGS.items():
            entries, shown = report["lists"][name], list[Part]()
            for entry in entries[:_MOST_ON_PAGE]:
                shown.append(Table(_RANKING_COLUMNS[:-1], [_make_cells(entry)[:-1]], _NUMBERS))
                shown.append(MarkedText([(entry.get("prompt", "") + "\n", False), (entry.get("answer", ""), True)]))
            parts.append(Section(title, [Text(_describe_count(name, entries), "soft"), *shown]))
        html.write(page, html.to_page(f"Scored data: {report['run']}", _summarize(report), parts))
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    terminal.show(*show_ranking(report, arguments.show))
    if exclude is not None:
        print(f"\nwritten: {exclude}; leave these documents out of the next run with data.exclude={exclude}")
    if page is not None:
        print(f"\npage: {page}")
    return 0


def show_ranking(report: dict[str, Any], num_shown: int) -> list[Part]:
    """Return what `data --scored` shows in a terminal, with at most `num_shown` documents of each list."""
    lists = []
    for name, title in FINDINGS.items():
        entries = report["lists"][name]
        table = Table(_RANKING_COLUMNS, [_make_cells(one) for one in entries[:num_shown]], _NUMBERS)
        lists.append(Section(f"{title} ({_describe_count(name, entries)})", [table] if entries else []))
    return [Text(_summarize(report)), *_find_caution(report), *lists]


def _summarize(report: dict[str, Any]) -> str:
    """Return what was scored, and under which weights."""
    weights = "the initial weights" if report["step"] == 0 else f"the weights of step {report['step']:,}"
    scored = f"{report['documents']:,} documents of {report['split']}, {report['trained_tokens']:,} trained tokens"
    return f"{report['run']}: {scored}, under {weights}; mean loss {report['mean_loss']:.4f}"


def _find_caution(report: dict[str, Any]) -> list[Text]:
    """Return why the lists say little about the documents, if they do."""
    ranked = report["lists"][MISLABELED]
    if report["step"] == 0:
        caution = (
            "caution: these weights have not trained on the data, so the lists show what the base model knows and does not know: "
            "a hard or unusual document looks mislabeled"
        )
    elif sum(entry["likely"] for entry in ranked) > len(ranked) * _MOST_LIKELY:
        caution = (
            "caution: for most documents the prompt explains nothing of the answer: the model has hardly learned from "
            "prompts yet, so that likely mislabeled says little about a document; train longer, or score another step with --step"
        )
    else:
        return []
    return [Text(caution, "warn")]


def _describe_count(name: str, entries: Sequence[dict[str, Any]]) -> str:
    """Return a list's number of documents and, for a ranking, how many are likely to be what it ranks them by."""
    if name != MISLABELED:
        return f"{len(entries):,} documents"
    likely = sum(entry["likely"] for entry in entries)
    return (
        f"{likely:,} of {len(entries):,} documents with a prompt, whose answer is no likelier with it; the first of the ranking"
    )


def _make_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a document under _RANKING_COLUMNS."""
    loss, alone = entry["loss"], entry["loss_alone"]
    return (
        entry["where"],
        entry["source"],
        f"{entry['tokens']:,}",
        f"{loss:.3f}",
        "-" if alone is None else f"{alone:.3f}",
        # A value slightly below zero would be shown as -0%.
        "-" if not alone else f"{round(1 - loss / alone, 2) + 0.0:.0%}",
        _shorten(entry.get("answer", "")),
    )


def compare_prompts(arguments: argparse.Namespace) -> int:
    """Compare prompts with the training prompts; returns 3 if they have drifted."""
    run_dir = run_store.find_own_run(arguments.run, arguments.root)
    if not Path(arguments.prompts).is_file():
        raise DataError(
            "there is no such file", where=arguments.prompts, remedy="name a file of prompts: JSON Lines, or one JSON array"
        )
    words = [arguments.prompts, *(["--likelihood"] if arguments.likelihood else [])]
    report = run_reporting("launcher.evaluate.drift", None, str(run_dir.plan), *words)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        terminal.show(*show_drift(report, run_dir.root.name))
    return EXIT_CHECK_FAILED if report["has_drifted"] else 0


def show_drift(report: dict[str, Any], run: str) -> list[Part]:
    """Return what `drift` shows, from the answer of launcher.evaluate.drift."""
    rows = [["prompts compared", f"{report['num_training']:,}", f"{report['num_prompts']:,}", ""]]
    for one in report["measures"]:
        figures = (f"{one[side]:.0%}" if one["name"] == "words" else f"{one[side]:.4g}" for side in ("training", "now"))
        rows.append([one["title"], *figures, f"p = {one['p_value']:.2g}"])
    gaps = Items([f"no likelihoods, {gap}" for gap in report["gaps"]])
    farthest = [f"{short_path(one['where'])} ({one['similarity']:.2f}): {one['text']}" for one in report["farthest"]]
    parts: list[Part] = [
        Text(report["sentence"], "warn" if report["has_drifted"] else "good"),
        Section("", [Table(["", "training", "now", "test"], rows, numbers=(1, 2)), gaps]),
        Section("farthest from training", [Items(farthest)]),
    ]
    if report["has_drifted"]:
        # The prompts have no answers.
        command = launcher_command("train", f"model.path=run:{run}", "data=jsonl", "data.path=ANSWERED.jsonl")
        advice = "With answers to such prompts in ANSWERED.jsonl, train on from this run with:"
        parts.append(Section("", [Text(advice), Commands([command])]))
    return parts
