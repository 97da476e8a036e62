"""The report on the data as one page with plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.cli.pages import charts, html_page
from launcher.cli.pages.charts import Series
from launcher.cli.views.data_view import (
    length_bins,
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


def _plots(report: dict[str, Any]) -> dict[str, Markup]:
    ends, series = length_bins(report)
    sources, findings = [source for source in report["sources"] if source["documents"]], report["findings"]
    return {
        "lengths": charts.stacked_bars(
            "Document length",
            [f"{end:,}" for end in ends],
            [Series(name, counts) for name, counts in series],
            "tokens, up to",
            "documents",
        ),
        "cumulative_lengths": charts.lines(
            "Cumulative document length",
            [source["length_quantiles"] for source in sources],
            [Series(source["name"], _percentages(len(source["length_quantiles"]))) for source in sources],
            "tokens",
            "% of documents",
            log_x=True,
        ),
        "shares": charts.bars(
            "Share of tokens by source", [(s["name"], s["frac"], f"{s['frac']:.1%}") for s in sources], highest=1
        ),
        "trained": charts.bars(
            "Trained share of the tokens",
            [(s["name"], s["trained_frac"], f"{s['trained_frac']:.1%} of {s['tokens']:,}") for s in sources],
            highest=1,
        ),
        "padding": charts.bars(
            "Padding", [(s["name"], s["padding_frac"], f"{s['padding_frac']:.2%}") for s in sources if s["epochs"]], highest=1
        ),
        "findings": charts.bars(
            "Share of the documents that were checked", [(one["name"], one["share"], _share_and_count(one)) for one in findings]
        ),
    }


def _share_and_count(finding: dict[str, Any]) -> str:
    return f"{share_text(finding['share'])} ({finding['count']:,} of {finding['total']:,})"


def _percentages(num_quantiles: int) -> list[float]:
    """Return the percentages of evenly spaced quantiles, from 0 to 100."""
    return [i * 100 / (num_quantiles - 1) for i in range(num_quantiles)]


def _finding_contexts(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the template shows for each finding."""
    return [
        {
            "title": f"{finding['count']:,} of {finding['total']:,} ({share_text(finding['share'])}) {finding['title']}",
            "is_fatal": finding["fatal"],
            "advice": f"{finding['meaning']}. Remedy: {finding['remedy']}",
            "setting": f"{finding['setting']}={finding['action']}: {outcome(finding)}",
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
