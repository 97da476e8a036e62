"""`data --scored RUN`: the documents in a run's data that are worth a look, by their losses under the run's weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli import formatting
from launcher.cli.pages import html_page
from launcher.cli.worker_process import run_reporting
from launcher.data.triage import FINDINGS, MISLABELED, write_exclusions
from launcher.errors import ConfigError, printable
from launcher.security import owners

# Number of documents per list on the page.
_MOST_ON_PAGE = 100
_MAX_CHARS = 60
# If a larger share looks mislabeled, the model lacks knowledge: data with that many wrong labels would teach nothing.
_MOST_LIKELY = 0.5
_COLUMNS = ("document", "source", ">tokens", ">loss", ">without prompt", ">explained", "answer")


def rank_documents(arguments: argparse.Namespace) -> int:
    """Score unscored documents, and show which are likely mislabeled, memorized, or have nothing to learn."""
    run_dir = run_store.find_run(arguments.scored, Path(arguments.root))
    owners.require_run(run_dir.root)
    page = html_page.require_writable_page(Path(arguments.html)) if arguments.html else None
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
        subtitle, *notes = _summarize(report)
        lists = [
            {
                "title": title,
                "count": _describe_count(name, report["lists"][name]),
                "documents": [
                    {
                        "cells": _cells(entry)[:-1],
                        "parts": [(entry.get("prompt", "") + "\n", False), (entry.get("answer", ""), True)],
                    }
                    for entry in report["lists"][name][:_MOST_ON_PAGE]
                ],
            }
            for name, title in FINDINGS.items()
        ]
        columns = [name.removeprefix(">") for name in _COLUMNS[:-1]]
        title = f"Scored data: {report['run']}"
        html_page.write(
            page, html_page.render("scored", title=title, subtitle=subtitle, notes=notes, columns=columns, lists=lists)
        )
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    print("\n".join(lines(report, arguments.show)))
    if exclude is not None:
        print(f"\nwritten: {exclude}; leave these documents out of the next run with data.exclude={exclude}")
    if page is not None:
        print(f"\npage: {page}")
    return 0


def lines(report: dict[str, Any], num_shown: int) -> list[str]:
    """Return the lines of the report, with at most `num_shown` documents of each list."""
    written = [*_summarize(report)]
    for name, title in FINDINGS.items():
        entries = report["lists"][name]
        written += ["", f"{title} ({_describe_count(name, entries)})"]
        if entries:
            written += formatting.table(_COLUMNS, [_cells(entry) for entry in entries[:num_shown]])
    return written


def _summarize(report: dict[str, Any]) -> list[str]:
    """Return what was scored, and under which weights."""
    weights = "the initial weights" if report["step"] == 0 else f"the weights of step {report['step']:,}"
    scored = f"{report['documents']:,} documents of {report['split']}, {report['trained_tokens']:,} trained tokens"
    summarized = [f"{report['run']}: {scored}, under {weights}; mean loss {report['mean_loss']:.4f}"]
    ranked = report["lists"][MISLABELED]
    if report["step"] == 0:
        summarized.append(
            "caution: these weights have not trained on the data, so the lists show what the base model knows and does not know: "
            "a hard or unusual document looks mislabeled"
        )
    elif sum(entry["likely"] for entry in ranked) > len(ranked) * _MOST_LIKELY:
        summarized.append(
            "caution: for most documents the prompt explains nothing of the answer: the model has hardly learned from "
            "prompts yet, so that likely mislabeled says little about a document; train longer, or score another step with --step"
        )
    return summarized


def _describe_count(name: str, entries: Sequence[dict[str, Any]]) -> str:
    """Return a list's number of documents and, for a ranking, how many are likely to be what it ranks them by."""
    if name != MISLABELED:
        return f"{len(entries):,} documents"
    likely = sum(entry["likely"] for entry in entries)
    return (
        f"{likely:,} of {len(entries):,} documents with a prompt, whose answer is no likelier with it; the first of the ranking"
    )


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a document under _COLUMNS."""
    loss, alone = entry["loss"], entry["loss_alone"]
    answer = printable(" ".join(entry.get("answer", "").split()))
    return (
        printable(entry["where"]),
        printable(entry["source"]),
        f"{entry['tokens']:,}",
        f"{loss:.3f}",
        "-" if alone is None else f"{alone:.3f}",
        # A value slightly below zero would be shown as -0%.
        "-" if not alone else f"{round(1 - loss / alone, 2) + 0.0:.0%}",
        answer if len(answer) <= _MAX_CHARS else f"{answer[:_MAX_CHARS]}...",
    )
