"""The verb data: build the data cache, print the report, and reject data that a run would reject."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import facts, hardware
from launcher.cli.arguments import COMMON_FLAGS, VerbParser, composing_usage
from launcher.cli.pages import html_page
from launcher.cli.worker_process import check_extra, prepare
from launcher.config.compose import Composed, run_hydra
from launcher.config.schema import RunConfig
from launcher.data import cache_store
from launcher.data import report as data_report
from launcher.data.checks import findings
from launcher.errors import ConfigError, DataError, Problem
from launcher.models.found_model import FoundModel, find_model
from launcher.plan.launch_plan import DataFacts, LaunchPlan
from launcher.plan.quantities import format_count
from launcher.shell_commands import launcher_command

USAGE = """python -m launcher data [FILE] [--show N] [--json] [--html FILE] [overrides]

Build the data cache and report on it: counts of the mixture and of each source, findings of the checks, and a few documents with
their trained tokens marked. Exit code 2 if a run with this data would be refused.

  --show N      show N whole rows instead of a few documents
  --json        print the report as JSON
  --html FILE   also write the report as one HTML page with plots

python -m launcher data --scored RUN [--step N] [--split NAME] [--json] [--html FILE] [--exclude FILE]
                rank the documents of a run's data by their losses: likely mislabeled, memorized, nothing to learn"""

# A note with more of them is not read.
_MOST_FINDINGS = 2
FLAGS = ("--show", "--json", "--html", "--scored")


def run(verb: str, tokens: list[str]) -> int:
    """Compose the settings and report on the data, once or, with -m, once per job."""
    if ("--help" in tokens or "-h" in tokens) and "--scored" not in tokens:
        print(composing_usage(USAGE))
        return 0
    if any(token.partition("=")[0] == "--scored" for token in tokens):
        from launcher.cli import scored_data

        return scored_data.run(tokens)
    chosen, rest = options(tokens)
    jobs: list[Composed] = []
    run_hydra(rest, jobs.append, (*FLAGS, *COMMON_FLAGS))
    if chosen.html is not None and len(jobs) > 1:
        raise ConfigError("--html writes one report, and -m makes several", where="--html", remedy="leave out --html, or -m")
    for composed in jobs:
        with composed.located():
            # The data does not depend on the nodes, and asking for them would need the scheduler.
            config = facts.resolve(composed.config, hardware.device)
            found = find_model(config.model)
            facts.check(config, found)
            check_extra(config)
        report = _cached_report(config, found, chosen.show)
        if report is None:
            report = prepare(config, show=chosen.show)["report"]
            found = find_model(config.model)
        if found.weights_note:
            print(f"note: {found.weights_note}", file=sys.stderr, flush=True)
        present(report, config, chosen, facts.id_problem(report["cache_dir"], found.facts))
    return 0


def _cached_report(config: RunConfig, found: FoundModel, num_shown: int) -> dict[str, Any] | None:
    """Return the report of a finished cache; None if data must be prepared first, or only transformers can decode its rows.

    Raises:
        DataError: if a block of the cache is damaged.
    """
    if (prepared := facts.prepared_data(config, found)) is None:
        return None
    cache_facts, eval_sets = prepared
    folder = found.tokenizer
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    # A tenth of the time that transformers takes.
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if tokenizer.get_vocab_size() <= cache_store.read_report(cache_facts.cache_dir)["max_token_id"]:
        return None
    return data_report.report(
        cache_facts,
        config.data,
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
        config.train,
        config.run.seed,
        found.stop_ids,
        num_shown,
        eval_sets,
    )


def options(tokens: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Parse the options of the verb; return them and the remaining words for Hydra.

    Raises:
        ConfigError: for an option without a value, or with an invalid one.
    """
    parser = VerbParser(prog="python -m launcher data", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--html", metavar="FILE", type=Path)
    parser.add_argument("--show", metavar="N", type=_count, default=0)
    chosen, overrides = parser.parse_known_args(tokens)
    if chosen.html is not None:
        chosen.html = html_page.require_writable_page(chosen.html)
    return chosen, overrides


def _count(value: str) -> int:
    if not value.isdecimal():
        raise ArgumentTypeError(f"not a number of rows: {value}")
    return int(value)


def present(report: dict[str, Any], config: RunConfig, chosen: Namespace, problem: Problem | None = None) -> None:
    """Print the report, and write the HTML page if --html is given; `problem` concerns data and model together.

    Raises:
        DataError: with `problem`, and the findings that the settings do not accept.
    """
    if chosen.html is not None:
        from launcher.cli.pages import data_html

        html_page.write(chosen.html, data_html.page(report, config.data.name))
    if chosen.json:
        print(json.dumps(report, indent=2))
    else:
        from launcher.cli.views import data_view

        data_view.show(report)
        if chosen.html is not None:
            print(f"\npage: {chosen.html}")
    problems = [*([problem] if problem else []), *findings.problems(findings.read(report["cache_dir"]), config.data.checks)]
    if problems:
        raise DataError(problems)


def check(config: RunConfig, facts: DataFacts | None) -> None:
    """Reject a run whose data has findings that the settings do not accept.

    Raises:
        DataError: with these findings.
    """
    if facts is not None:
        findings.refuse(findings.read(facts.cache_dir), config.data.checks)


def summarize_findings(plan: LaunchPlan, fatal: bool) -> str | None:
    """Return one line about the findings that refuse the run, or about those that the settings accept; None without any."""
    if plan.data is None:
        return None
    judged = findings.judge(findings.read(plan.data.cache_dir), plan.config.data.checks)
    # Kept documents come before dropped ones. The plan has its own note about truncated ones.
    shown = [one for one in judged if one.fatal == fatal and (fatal or one.finding.name != "truncated")]
    shown.sort(key=lambda one: one.action == "drop")
    texts = [f"{'dropped: ' * (one.action == 'drop')}{one.finding.count:,} {one.finding.title}" for one in shown[:_MOST_FINDINGS]]
    if more := len(shown) - len(texts):
        texts.append(format_count(more, "more finding"))
    # The command has the plan's file and overrides.
    hint = f"see them with: {launcher_command('data', *plan.provenance.overrides)}"
    return "; ".join([*texts, *(["the run would be refused"] if fatal else []), hint]) if texts else None
