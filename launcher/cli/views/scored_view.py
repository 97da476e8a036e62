"""The lists of `data --scored` in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.cli import formatting
from launcher.data.triage.ranking import FINDINGS, MISLABELED
from launcher.errors import printable

COLUMNS = ("document", "source", ">tokens", ">loss", ">without prompt", ">explained", "answer")
_MAX_CHARS = 60
# If a larger share looks mislabeled, the model lacks knowledge: data with that many wrong labels would teach nothing.
_MOST_LIKELY = 0.5


def lines(report: dict[str, Any], num_shown: int) -> list[str]:
    """Return the lines of the report, with at most `num_shown` documents of each list."""
    written = [*summary(report)]
    for name, title in FINDINGS.items():
        entries = report["lists"][name]
        written += ["", f"{title} ({describe_count(name, entries)})"]
        if entries:
            written += formatting.table(COLUMNS, [cells(entry) for entry in entries[:num_shown]])
    return written


def summary(report: dict[str, Any]) -> list[str]:
    """Return what was scored, and under which weights."""
    weights = "the initial weights" if report["step"] == 0 else f"the weights of step {report['step']:,}"
    scored = f"{report['documents']:,} documents of {report['split']}, {report['trained_tokens']:,} trained tokens"
    summarized = [f"{report['run']}: {scored}, under {weights}; mean loss {report['mean_loss']:.4f}"]
    if report["step"] == 0:
        summarized.append(
            "caution: these weights have not trained on the data, so the lists show what the base model knows and does not know: "
            "a hard or unusual document looks mislabeled"
        )
    ranked = report["lists"][MISLABELED]
    if report["step"] and sum(entry["likely"] for entry in ranked) > len(ranked) * _MOST_LIKELY:
        summarized.append(
            "caution: for most documents the prompt explains nothing of the answer: the model has hardly learned from "
            "prompts yet, so that likely mislabeled says little about a document; train longer, or score another step with --step"
        )
    if not report["has_origins"]:
        summarized.append("the data cache does not record files and lines; a run with the same settings builds one that does")
    return summarized


def describe_count(name: str, entries: Sequence[dict[str, Any]]) -> str:
    """Return a list's number of documents and, for a ranking, how many are likely to be what it ranks them by."""
    if name != MISLABELED:
        return f"{len(entries):,} documents"
    likely = sum(entry["likely"] for entry in entries)
    return (
        f"{likely:,} of {len(entries):,} documents with a prompt, whose answer is no likelier with it; the first of the ranking"
    )


def _share(value: float) -> str:
    # A value slightly below zero would be shown as -0%.
    return f"{round(value, 2) + 0.0:.0%}"


def cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a document under COLUMNS."""
    loss, alone = entry["loss"], entry["loss_alone"]
    answer = printable(" ".join(entry.get("answer", "").split()))
    return (
        printable(entry["where"] or f"document {entry['document']}"),
        printable(entry["source"]),
        f"{entry['tokens']:,}",
        f"{loss:.3f}",
        "-" if alone is None else f"{alone:.3f}",
        "-" if not alone else _share(1 - loss / alone),
        answer if len(answer) <= _MAX_CHARS else f"{answer[:_MAX_CHARS]}...",
    )
