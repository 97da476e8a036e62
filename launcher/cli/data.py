"""The verb data: build the cache, report on it, and refuse what a run would refuse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cli import html_page
from launcher.config.schema import RunConfig
from launcher.data.checks import findings
from launcher.errors import ConfigError
from launcher.plan.launch_plan import DataFacts

USAGE = """python -m launcher data [--show N] [--json] [--html FILE] [overrides]

Build the data cache and report on it: numbers of the mixture and of each source, faults of the documents, and a few documents
in which the trained tokens are marked. Exit code 2 where a run would be refused.

  --show N      show N rows instead, with the borders of their documents
  --json        print the report for programs
  --html FILE   write the report as one page with plots"""


@dataclass(frozen=True)
class Options:
    as_json: bool = False
    html: Path | None = None
    num_shown: int = 0


def options(tokens: Sequence[str]) -> tuple[Options, list[str]]:
    """The verb's own options, and what is left for Hydra.

    Raises:
        ConfigError: for an option without its value, or with one that cannot be.
    """
    values: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(tokens)
    while waiting:
        token = waiting.pop(0)
        name, given, value = token.partition("=")
        if name not in ("--html", "--show"):
            rest.append(token)
            continue
        if not given:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("-") else ""
        if not value:
            raise ConfigError(f"{name} needs a value", where="command line", remedy=f"write {_EXAMPLES[name]}")
        values[name] = value
    as_json = "--json" in rest
    rest = [token for token in rest if token != "--json"]  # noqa: S105
    html = html_page.require_place(Path(values["--html"])) if "--html" in values else None
    return Options(as_json, html, _count(values.get("--show", "0"))), rest


_EXAMPLES = {"--html": "--html report.html", "--show": "--show 3"}


def _count(value: str) -> int:
    if not value.isdecimal() or int(value) > 1000:
        raise ConfigError(
            "--show is a number of rows up to 1000", where="--show", value=value, remedy=f"write {_EXAMPLES['--show']}"
        )
    return int(value)


def present(report: dict[str, Any], config: RunConfig, chosen: Options) -> None:
    """Print the report, and write its page where one is asked for.

    Raises:
        DataError: with the findings for which a run would be refused.
    """
    if chosen.html is not None:
        from launcher.cli import data_html

        html_page.write(chosen.html, data_html.page(report, config.data.name))
    if chosen.as_json:
        print(json.dumps(report, indent=2))
    else:
        from launcher.cli import data_view

        data_view.show(report)
        if chosen.html is not None:
            print(f"\npage: {chosen.html}")
    findings.refuse(findings.read(report["cache_dir"]), config.data.checks)


def check(config: RunConfig, facts: DataFacts | None) -> None:
    """Refuse a run for what was found in its data.

    Raises:
        DataError: with the findings that the settings do not accept.
    """
    if facts is not None:
        findings.refuse(findings.read(facts.cache_dir), config.data.checks)


def refusal(config: RunConfig, facts: DataFacts | None) -> str | None:
    """One line about findings for which a run would be refused."""
    return _told(config, facts, fatal=True, means="a run is refused for that: see python -m launcher data")


def accepted(config: RunConfig, facts: DataFacts | None) -> str | None:
    """One line about findings that are trained on, and about those that were dropped."""
    return _told(config, facts, fatal=False, means="python -m launcher data shows where")


def _told(config: RunConfig, facts: DataFacts | None, fatal: bool, means: str) -> str | None:
    if facts is None:
        return None
    judged = findings.judge(findings.read(facts.cache_dir), config.data.checks)
    meant = [one for one in judged if one.fatal == fatal]
    said = "; ".join(
        f"{'dropped: ' if one.action == 'drop' else ''}{one.finding.count:,} {one.finding.title}"
        for one in sorted(meant, key=lambda one: one.action == "drop")
    )
    return f"{said} ({means})" if said else None
