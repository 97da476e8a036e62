"""The lists of `data --scored` as one page."""

from __future__ import annotations

from typing import Any

from launcher.cli.pages import html_page
from launcher.cli.views import scored_view
from launcher.data.triage.ranking import FINDINGS

# Number of documents per list on the page.
_MOST = 100
_COLUMNS = [name.removeprefix(">") for name in scored_view.COLUMNS[:-1]]


def page(report: dict[str, Any]) -> str:
    """Return a self-contained HTML page of the report from launcher.worker.scoring.triage."""
    subtitle, *notes = scored_view.summary(report)
    lists = [
        {
            "title": title,
            "count": scored_view.describe_count(name, report["lists"][name]),
            "documents": [
                {
                    "cells": scored_view.cells(entry)[:-1],
                    "parts": [(entry.get("prompt", "") + "\n", False), (entry.get("answer", ""), True)],
                }
                for entry in report["lists"][name][:_MOST]
            ],
        }
        for name, title in FINDINGS.items()
    ]
    title = f"Scored data: {report['run']}"
    return html_page.render("scored", title=title, subtitle=subtitle, notes=notes, columns=_COLUMNS, lists=lists)
