"""The report on the data as one page with plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.cli.pages import charts, html_page
from launcher.cli.views.data_view import (
    outcome,
    row_width,
    source_columns,
    source_notes,
    summary_rows,
    visible,
)
from launcher.data.checks.findings import share_text
from launcher.plan.quantities import format_count

if TYPE_CHECKING:
    from markupsafe import Markup


def page(report: dict[str, Any], name: str) -> str:
    """Return a self-contained HTML page of the report from launcher.data.report; `name` is the name of the data."""
    return html_page.render(
        "data",
        title=f"Data: {name}",
        subtitle=f"cache {report['cache_dir']}",
        facts=[
            (f"{report['documents']:,}", "documents"),
            (f"{report['rows']:,}", f"rows of up to {row_width(report)}"),
            (f"{report['tokens']:,}", "tokens"),
            (f"{report['trained_frac']:.1%}", "trained"),
            (f"{report['padding_frac']:.2%}", "padding"),
            (f"{report['held_out']['documents']:,}", "held-out documents"),
        ],
        verdict=_verdict(report["findings"]),
        sources=source_columns(report),
        source_notes=list(source_notes(report)),
        summary=[list(row) for row in summary_rows(report)],
        plots=_plots(report),
        findings=_finding_contexts(report["findings"]),
        samples=_samples(report["shown"]),
    )


def _verdict(findings: list[dict[str, Any]]) -> dict[str, str]:
    """Return a text and its kind: bad, warn or good."""
    refused = [finding for finding in findings if finding["fatal"]]
    if refused:
        reasons = "; ".join(
            f"{finding['count']:,} {finding['title']} ({finding['accepted_by']} accepts it)" for finding in refused
        )
        return {"kind": "bad", "text": f"A run is refused: {reasons}"}
    if findings:
        checks = "1 check has" if len(findings) == 1 else f"{len(findings)} checks have"
        return {"kind": "warn", "text": f"{checks} findings; the run is not refused"}
    return {"kind": "good", "text": "No findings"}


def _plots(report: dict[str, Any]) -> list[Markup]:
    sources = [source for source in report["sources"] if source["documents"]]
    bins = [(f"{one['max_tokens']:,}", one["documents"], f"{one['documents']:,}") for one in report["length_histogram"]]
    shares = [(one["name"], one["frac"], f"{one['frac']:.1%}") for one in sources]
    trained = [(one["name"], one["trained_frac"], f"{one['trained_frac']:.1%} of {one['tokens']:,}") for one in sources]
    return [
        charts.bars("Documents by length: tokens, up to", bins),
        charts.bars("Share of tokens by source", shares, highest=1),
        charts.bars("Trained share of the tokens", trained, highest=1),
    ]


def _finding_contexts(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the template shows for each finding."""
    return [
        {
            "title": f"{finding['count']:,} of {finding['total']:,} ({share_text(finding['share'])}) {finding['title']}",
            "is_fatal": finding["fatal"],
            "advice": f"{finding['meaning']}. Remedy: {finding['remedy']}",
            "setting": (f"{finding['setting']}={finding['action']}: " if finding["setting"] else "") + outcome(finding),
            "sources": ", ".join(f"{name} {count:,}" for name, count in finding["sources"].items()),
            "examples": [f"{example['where']}: {example['detail']}" for example in finding["examples"]],
        }
        for finding in findings
    ]


def _samples(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a title, and each document's caption and text parts, for the rows or documents to show."""
    samples = []
    for number, sample in enumerate(shown, start=1):
        documents = []
        for position, document in enumerate(sample["documents"], start=1):
            order = f"document {position} of {len(sample['documents'])}, " if sample["whole"] else ""
            parts = [(visible(part["text"]), part["trained"]) for part in document["parts"]]
            documents.append(
                {"caption": f"{order}{document['source']}, {format_count(document['tokens'], 'token')}", "parts": parts}
            )
        title = f"Row {sample['row']:,}" if sample["whole"] else f"Document {number}"
        samples.append({"title": title, "documents": documents})
    return samples
