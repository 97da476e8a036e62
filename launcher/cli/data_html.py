"""The report on the data as one page with plots."""

from __future__ import annotations

from typing import Any

from launcher.cli import html_page as html
from launcher.cli.data_view import (
    length_bins,
    number_rows,
    row_width,
    source_notes,
    summary_rows,
    visible,
)
from launcher.cli.html_page import Series
from launcher.data.checks.findings import share_text


def page(report: dict[str, Any], name: str) -> str:
    """A self-contained HTML page of the report of launcher.data.report; `name` is that of the data."""
    held_out = report["held_out"]
    header, *rows = number_rows(report)
    body = [
        html.cards(
            [
                (f"{report['documents']:,}", "documents"),
                (f"{report['rows']:,}", f"rows of up to {row_width(report)}"),
                (f"{report['tokens']:,}", "tokens"),
                (f"{report['trained_frac']:.1%}", "of them trained"),
                (f"{report['padding_frac']:.2%}", "padding"),
                (f"{held_out['documents']:,}", "held-out documents"),
            ]
        ),
        _verdict(report["findings"]),
        html.heading("Sources"),
        html.table(header, rows, numbers=range(1, len(header))),
        *(html.paragraph(line) for line in source_notes(report)),
        html.table([], [list(row) for row in summary_rows(report)]),
        html.heading("Plots"),
        *_plots(report),
        html.heading("Findings"),
        *_findings(report["findings"]),
        html.heading("What is trained"),
        html.paragraph(
            "The marked tokens are trained. Keys, passwords, e-mail addresses and telephone numbers are left out here."
        ),
        *_shown(report["shown"]),
    ]
    return html.page(f"Data: {name}", f"cache {report['cache_dir']}", body)


def _verdict(found: list[dict[str, Any]]) -> str:
    refused = [one for one in found if one["fatal"]]
    if refused:
        said = "; ".join(f"{one['count']:,} {one['title']} ({one['accepted_by']} accepts it)" for one in refused)
        return html.paragraph(f"A run is refused: {said}", "bad")
    if found:
        return html.paragraph(f"{len(found)} kinds of findings, none of which stops a run", "warn")
    return html.paragraph("No findings", "good")


def _plots(report: dict[str, Any]) -> list[str]:
    ends, series = length_bins(report)
    sources = [source for source in report["sources"] if source["documents"]]
    lengths = html.stacked_bars(
        "Length of documents",
        [f"{end:,}" for end in ends],
        [Series(name, counts) for name, counts in series],
        "tokens, up to",
        "documents",
    )
    reached = html.lines(
        "Documents that are no longer than",
        [source["length_quantiles"] for source in sources],
        [
            Series(
                source["name"], [i * 100 / (len(source["length_quantiles"]) - 1) for i in range(len(source["length_quantiles"]))]
            )
            for source in sources
        ],
        "tokens",
        "% of documents",
        log_x=True,
    )
    shares = html.bars("Share of the tokens", [(s["name"], s["frac"], f"{s['frac']:.1%}") for s in sources], highest=1)
    trained = html.bars(
        "Trained tokens",
        [(s["name"], s["trained_frac"], f"{s['trained_frac']:.1%} of {s['tokens']:,}") for s in sources],
        highest=1,
    )
    padding = html.bars(
        "Padding", [(s["name"], s["padding_frac"], f"{s['padding_frac']:.2%}") for s in sources if s["epochs"]], highest=1
    )
    return [html.side_by_side(lengths, reached), html.side_by_side(shares, trained), padding]


def _findings(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return [html.paragraph("none", "good")]
    rows = []
    for one in found:
        examples = "\n".join(f"·\u00a0{example['where']}: {example['detail']}" for example in one["examples"])
        done = f"{one['setting']}={one['action']}" + ("\na run is refused" if one["fatal"] else "")
        by_source = "\n".join(f"{name}: {count:,}" for name, count in one["sources"].items())
        rows.append(
            [one["title"], f"{one['count']:,}", share_text(one["share"]), by_source, examples, f"{done}\n{one['remedy']}"]
        )
    table = html.table(["finding", "count", "share", "sources", "examples", "setting, remedy"], rows, numbers=(1, 2))
    counts = html.bars("Documents concerned", [(one["name"], one["share"], f"{one['count']:,}") for one in found])
    return [table, counts]


def _shown(shown: list[dict[str, Any]]) -> list[str]:
    pieces = []
    for number, one in enumerate(shown, start=1):
        documents = one["documents"]
        pieces.append(html.heading(f"Row {one['row']:,}" if one["whole"] else f"Document {number}", 3))
        for place, document in enumerate(documents, start=1):
            border = f"document {place} of {len(documents)}, " if one["whole"] else ""
            pieces.append(html.paragraph(f"{border}{document['source']}, {document['tokens']:,} tokens"))
            pieces.append(html.marked([(visible(part["text"]), part["trained"]) for part in document["parts"]]))
    return pieces
