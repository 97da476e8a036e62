"""`data --scored RUN`: the documents in a run's data that are worth a look, by their losses under the run's weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli.render import html, terminal
from launcher.cli.render.sections import MarkedText, Part, Section, Table, Text
from launcher.cli.worker_process import run_reporting
from launcher.data.triage import FINDINGS, MISLABELED, write_exclusions
from launcher.errors import ConfigError
from launcher.security import owners

# Number of documents per list on the page.
_MOST_ON_PAGE = 100
_MAX_CHARS = 60
# If a larger share looks mislabeled, the model lacks knowledge: data with that many wrong labels would teach nothing.
_MOST_LIKELY = 0.5
_COLUMNS, _NUMBERS = ("document", "source", "tokens", "loss", "without prompt", "explained", "answer"), range(2, 6)
_ABOUT_TEXTS = (
    "Losses are in nats a token. The marked text is trained: its beginning, after the end of the prompt. Keys, passwords, e-mail "
    "addresses and telephone numbers are left out here."
)


def rank_documents(arguments: argparse.Namespace) -> int:
    """Score unscored documents, and show which are likely mislabeled, memorized, or have nothing to learn."""
    run_dir = run_store.find_run(arguments.scored, Path(arguments.root))
    owners.require_run(run_dir.root)
    page = html.require_writable_page(Path(arguments.html)) if arguments.html else None
    exclude = Path(arguments.exclude) if arguments.exclude else None
    if exclude is not None and (exclude.exists() or not exclude.absolute().parent.is_dir()):
        raise ConfigError("the file exists already, or its folder does not", where="--exclude", value=str(exclude))
    options = ["--split", arguments.split, *([] if arguments.step is None else ["--step", str(arguments.step)])]
    report = run_reporting("launcher.evaluate.documents_report", None, str(run_dir.plan), *options)
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
                shown.append(Table(_COLUMNS[:-1], [_make_cells(entry)[:-1]], _NUMBERS))
                shown.append(MarkedText([(entry.get("prompt", "") + "\n", False), (entry.get("answer", ""), True)]))
            parts.append(Section(title, [Text(_describe_count(name, entries), "soft"), *shown]))
        html.write(page, html.to_page(f"Scored data: {report['run']}", _summarize(report), parts))
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    terminal.show(*to_sections(report, arguments.show))
    if exclude is not None:
        print(f"\nwritten: {exclude}; leave these documents out of the next run with data.exclude={exclude}")
    if page is not None:
        print(f"\npage: {page}")
    return 0


def to_sections(report: dict[str, Any], num_shown: int) -> list[Part]:
    """Return what a terminal shows, with at most `num_shown` documents of each list."""
    lists = []
    for name, title in FINDINGS.items():
        entries = report["lists"][name]
        table = Table(_COLUMNS, [_make_cells(one) for one in entries[:num_shown]], _NUMBERS)
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
    """Return the cells of a document under _COLUMNS."""
    loss, alone = entry["loss"], entry["loss_alone"]
    answer = " ".join(entry.get("answer", "").split())
    return (
        entry["where"],
        entry["source"],
        f"{entry['tokens']:,}",
        f"{loss:.3f}",
        "-" if alone is None else f"{alone:.3f}",
        # A value slightly below zero would be shown as -0%.
        "-" if not alone else f"{round(1 - loss / alone, 2) + 0.0:.0%}",
        answer if len(answer) <= _MAX_CHARS else f"{answer[:_MAX_CHARS]}...",
    )
