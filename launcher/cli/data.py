"""The verb data: build the data cache, print the report, and reject data that a run would reject."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from launcher import facts, hardware
from launcher.cli.pages import html_page
from launcher.cli.verbs import flags_of
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

# A note with more of them is not read.
_MOST_FINDINGS = 2


def report_data(arguments: Namespace) -> int:
    """Compose the settings and report on the data, once or, with -m, once per job."""
    page = html_page.require_writable_page(Path(arguments.html)) if arguments.html is not None else None
    jobs: list[Composed] = []
    run_hydra(arguments.overrides, jobs.append, flags_of("data"))
    if page is not None and len(jobs) > 1:
        raise ConfigError("--html writes one report, and -m makes several", where="--html", remedy="leave out --html, or -m")
    for composed in jobs:
        with composed.located():
            # The data does not depend on the nodes, and asking for them would need the scheduler.
            config = facts.resolve(composed.config, hardware.device)
            found = find_model(config.model)
            facts.check(config, found)
            check_extra(config)
        report = _cached_report(config, found, arguments.show)
        if report is None:
            report = prepare(config, show=arguments.show)["report"]
            found = find_model(config.model)
        if found.weights_note:
            print(f"note: {found.weights_note}", file=sys.stderr, flush=True)
        present(report, config, arguments.json, page, facts.id_problem(report["cache_dir"], found.facts))
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


def present(report: dict[str, Any], config: RunConfig, as_json: bool, page: Path | None, problem: Problem | None) -> None:
    """Print the report, and write it to an HTML `page`; `problem` concerns data and model together.

    Raises:
        DataError: with `problem`, and the findings that the settings do not accept.
    """
    if page is not None:
        from launcher.cli.pages import data_html

        html_page.write(page, data_html.page(report, config.data.name))
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from launcher.cli.views import data_view

        data_view.show(report)
        if page is not None:
            print(f"\npage: {page}")
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
