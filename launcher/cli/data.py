"""The verb data: build the data cache, report on it, and reject data that a run would reject."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from launcher import facts, hardware
from launcher.cli.render import html, terminal
from launcher.cli.render.sections import (
    BarChart,
    Cards,
    Charts,
    Items,
    MarkedText,
    Part,
    Rows,
    Section,
    Table,
    Text,
)
from launcher.cli.verbs import flags_of
from launcher.cli.worker_process import check_extra, prepare
from launcher.config.compose import run_hydra
from launcher.config.schema import RunConfig
from launcher.data import cache_store
from launcher.data import report as data_report
from launcher.data.checks import findings
from launcher.errors import UNPRINTABLE, ConfigError, DataError
from launcher.models.found_model import FoundModel, find_model
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count, format_size
from launcher.shell_commands import launcher_command

# A note with more of them is not read.
_MOST_FINDINGS = 2
_LABEL_COLUMNS = 13
# Rounding error of token shares.
_ROUNDING = 1e-6
# What happens to the documents of a finding that does not reject the run, if its setting does not say so.
_OUTCOMES = {"dropped": "not trained", "truncated": "trained without the rest"}
# Whether the model stops at a token that ends turns.
_STOPS = {True: "the model stops there", False: "the model does not stop there, but the generation settings of the export do"}
_MARKED = "The marked tokens are trained. Keys, passwords, e-mail addresses and telephone numbers are left out here."


def report_data(arguments: Namespace) -> int:
    """Compose the settings and report on the data, once or, with -m, once per job."""
    page = html.require_writable_page(arguments.html) if arguments.html is not None else None
    jobs = run_hydra(arguments.overrides, flags_of("data"))
    if page is not None and len(jobs) > 1:
        raise ConfigError("--html writes one report, and -m makes several", where="--html", remedy="leave out --html, or -m")
    for composed in jobs:
        with composed.located():
            # The data does not depend on the nodes, and asking for them would need the scheduler.
            config = facts.resolve_settings(composed.config, hardware.device)
            found = find_model(config.model)
            facts.check(config, found)
            check_extra(config)
        report = _read_cached_report(config, found, arguments.show)
        if report is None:
            report = prepare(config, show=arguments.show)["report"]
            found = find_model(config.model)
        if found.weights_note:
            print(f"note: {found.weights_note}", file=sys.stderr, flush=True)
        id_problem, parts = facts.id_problem(report["cache_dir"], found.facts), to_sections(report)
        if page is not None:
            html.write(page, html.to_page(f"Data: {config.data.name}", f"cache {report['cache_dir']}", parts))
        if arguments.json:
            print(json.dumps(report, indent=2))
        else:
            terminal.show(*parts, label_columns=_LABEL_COLUMNS)
            if page is not None:
                print(f"\npage: {page}")
        problems = findings.problems(findings.read(report["cache_dir"]), config.data.checks)
        if problems := [*([id_problem] if id_problem else []), *problems]:
            raise DataError(problems)
    return 0


def _read_cached_report(config: RunConfig, found: FoundModel, num_shown: int) -> dict[str, Any] | None:
    """Return the report of a finished cache; None if data must be prepared first, or only transformers can decode its rows."""
    if (prepared := facts.find_prepared_data(config, found)) is None:
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


def to_sections(report: dict[str, Any]) -> list[Part]:
    """Return what is shown of the report of launcher.data.report."""
    sources = [one for one in report["sources"] if one["documents"]]
    lengths = [(f"{one['max_tokens']:,}", one["documents"], f"{one['documents']:,}") for one in report["length_histogram"]]
    shares = [(one["name"], one["frac"], f"{one['frac']:.1%}") for one in sources]
    trained = [(one["name"], one["trained_frac"], f"{one['trained_frac']:.1%} of {one['tokens']:,}") for one in sources]
    parts: list[Part] = [
        Cards(
            [
                ("documents", f"{report['documents']:,}"),
                (f"rows of up to {_describe_width(report)}", f"{report['rows']:,}"),
                ("tokens", f"{report['tokens']:,}"),
                ("trained", f"{report['trained_frac']:.1%}"),
                ("padding", f"{report['padding_frac']:.2%}"),
                ("held-out documents", f"{report['held_out']['documents']:,}"),
            ]
        ),
        Rows(summarize(report)),
    ]
    header, *rows = list_numbers(report)
    # A single table would be too wide.
    split = header.index("epochs")
    for columns in ([*range(split)], [0, *range(split, len(header))]) if rows else ():
        cells = [[row[i] for i in columns] for row in (header, *rows)]
        parts.append(Section("", [Table(cells[0], cells[1:], range(1, len(columns)))]))
    parts.append(Items([_show_controls(note) for note in list_notes(report)], "soft"))
    parts.append(
        Charts(
            [
                BarChart("Documents by length: tokens, up to", lengths),
                BarChart("Share of tokens by source", shares, highest=1),
                BarChart("Trained share of the tokens", trained, highest=1),
            ]
        )
    )
    parts.append(_show_findings(report["findings"]))
    shown: list[Part] = []
    for number, one in enumerate(report["shown"], start=1):
        documents, inner = one["documents"], list[Part]()
        for position, document in enumerate(documents, start=1):
            order = f"document {position} of {len(documents)}, " if one["whole"] else ""
            inner.append(Text(f"{order}{document['source']}, {format_count(document['tokens'], 'token')}", "soft"))
            inner.append(MarkedText([(_show_controls(part["text"]), part["trained"]) for part in document["parts"]]))
        num_tokens = format_count(sum(document["tokens"] for document in documents), "token")
        shown.append(Section(f"row {one['row']:,}, {num_tokens}" if one["whole"] else f"document {number}", inner))
    return [*parts, Section("What is trained", [Text(_MARKED, "soft"), *shown])] if shown else parts


def summarize(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return labels and values that describe the whole cache."""
    if report["packing"]:
        filled = f"packed, filled to {report['fill_frac']:.2%} ({report['padding_frac']:.2%} padding)"
    else:
        most, up_to = ("at most ", "up to ") if report["padding_is_most"] else ("", "")
        batches = f"micro-batches of {up_to}{report['padded_rows']:,} of about the same length"
        filled = f"one document each; {most}{report['padding_frac']:.2%} padding in {batches}"
    cut = f"; truncated: {format_count(report['truncated_tokens'], 'token')}" if report["truncated_tokens"] else ""
    ends = "".join(f"; {end['token']} (token {end['id']}): {_STOPS[end['stops']]}" for end in report["turn_ends"])
    rows = [
        ("rows", f"{report['rows']:,} of up to {_describe_width(report)}, {filled}"),
        (
            "tokens",
            f"{report['tokens']:,}, of which {report['trained_tokens']:,} ({report['trained_frac']:.1%}) are trained{cut}",
        ),
        ("end of turn", f"trained in {report['documents_with_turn_end']:,} of {report['documents']:,} documents{ends}"),
    ]
    if report["dropped_documents"]:
        too_long, excluded = report["too_long_documents"], report["excluded_documents"]
        by_checks = report["dropped_documents"] - too_long - excluded
        dropped = f"{format_count(by_checks, 'document')} by data.checks, {too_long:,} longer than a row"
        rows.append(("dropped", dropped + (f", {excluded:,} by data.exclude" if excluded else "")))
    for one in report["eval_sets"]:
        packed = format_count(one["rows"], "packed row")
        documents = f"{one['documents']:,} of {one['read_documents']:,} documents in {packed}"
        scored = f"{one['trained_tokens']:,} of {one['tokens']:,} tokens are scored"
        rows.append(("evaluation", f"set {one['name']}: {documents}, {scored}"))
    rows += [("warning", warning) for warning in report["warnings"]]
    return [*rows, ("cache", f"{report['cache_dir']} ({format_size(report['cache_bytes'])})")]


def _describe_width(report: dict[str, Any]) -> str:
    """Return the length of the longest row, and data.max_length if all rows are shorter."""
    most, width = report["max_length"], report["row_tokens"]
    return format_count(width, "token") + (f" (data.max_length is {most:,})" if width < most else "")


def list_numbers(report: dict[str, Any]) -> list[list[str]]:
    """Return the header, and a row of cells for each source, for a mixture of several, and for the held-out split."""
    header = [
        *("source", "read", "dropped", "documents", "cut", "split", "end of turn", "median", "longest"),
        *("epochs", "rows", "tokens", "share", "trained"),
    ]
    counted = [(one["name"], one, f"{one['epochs']:.2f}", one["frac"]) for one in report["sources"] if one["read_documents"]]
    if len(counted) > 1:
        counted.append(("mixture", report, "", 1))
    if report["held_out"]["read_documents"]:
        # It is outside the mixture.
        counted.append(("held out", report["held_out"], "", None))
    rows = [header]
    for name, counts, epochs, share in counted:
        keys = ("read_documents", "dropped_documents", "documents", "truncated_documents", "split_documents")
        ends, documents = counts.get("documents_with_turn_end"), counts["documents"]
        # Only the whole is shown as 100%.
        end_share = "" if ends is None else "100%" if ends >= documents else f"{min(ends / documents, 0.999):.1%}"
        lengths = counts["document_tokens"] or {"median": 0, "max": 0}
        rows.append(
            [
                name,
                *(f"{counts[key]:,}" if key in counts else "" for key in keys),
                *(end_share, f"{lengths['median']:,}", f"{lengths['max']:,}"),
                *(epochs, f"{counts['rows']:,}", f"{counts['tokens']:,}", "" if share is None else f"{share:.1%}"),
                f"{counts['trained_frac']:.1%}",
            ]
        )
    return rows


def list_notes(report: dict[str, Any]) -> list[str]:
    """Return lines with information about the sources that has no column in the tables."""
    notes = []
    for source in report["sources"]:
        name, part = source["name"], source["epochs"] % 1
        if source["documents"] and _ROUNDING < part < 1 - _ROUNDING:
            taken = f"{source['epochs']:.2f} passes over it in each epoch of the run"
            notes.append(f"{name}: {taken}; the partial pass uses the same documents in every epoch")
        if not source["is_read"]:
            notes.append(f"{name}: not read because its weight is 0")
        elif count := source["unused_documents"]:
            num_documents = source["read_documents"] - source["dropped_documents"]
            limits = " and ".join(source["limited_by"])
            notes.append(f"{name}: {count:,} of {num_documents:,} documents are not in the mixture because of its {limits}")
        if more := source["num_left_out"]:
            names = ", ".join(source["left_out"]) + (", ..." if more > len(source["left_out"]) else "")
            notes.append(f"{name}: files read: {source['num_files']:,}, left out: {more:,} ({names})")
        if counts := source["unread_keys"]:
            keys = ", ".join(f"{key} ({count:,})" for key, count in counts.items())
            others = f", and {source['num_other_unread_keys']:,} more" if source["num_other_unread_keys"] else ""
            notes.append(f"{name}: unread keys (rows): {keys}{others}")
        if as_chat := source["completions_as_chat"]:
            how = "with the chat template, as the user's message and the assistant's answer"
            joined = "completions: text in data.sources joins them"
            notes.append(f"{name}: {as_chat:,} prompts and completions are written {how} ({joined})")
        if as_text := source["completions"] - as_chat:
            how = "without the chat template (completions: chat in data.sources writes them with it)"
            notes.append(f"{name}: {as_text:,} prompts and completions are joined as they are, {how}")
    held_out = report["held_out"]
    if count := held_out["unused_documents"]:
        num_documents = held_out["read_documents"] - held_out["dropped_documents"]
        limit = f"data.eval_max_rows={held_out['max_rows']}"
        notes.append(
            f"held out: {count:,} of {num_documents:,} documents are neither evaluated nor trained on because of {limit}"
        )
    return notes


def _show_findings(found: list[dict[str, Any]]) -> Section:
    """Return what the findings mean for a run, and each finding with its examples and remedy."""
    is_refused = any(one["fatal"] for one in found)
    verdict = f"a run is {'' if is_refused else 'not '}refused" if found else "none"
    parts: list[Part] = [Text(verdict, "bad" if is_refused else "" if found else "good")]
    for one in found:
        if one["fatal"]:
            outcome = f"the run is refused; {one['accepted_by']} accepts them"
        elif one["action"] == "drop":
            outcome = "dropped"
        else:
            outcome = _OUTCOMES.get(one["name"], "kept")
            of = " of a source" if one["name"] == "no_turn_end" else ""
            outcome += "" if one["action"] == "keep" else f"; more than {100 * one['limit']:g}%{of} would refuse the run"
        title = f"{one['count']:,} of {one['total']:,} ({findings.share_text(one['share'])})  {one['title']}: {outcome}"
        setting = f" (currently {one['setting']}={one['action']})" if one["setting"] else ""
        advice = [Text(f"{one['meaning']}. Remedy: {one['remedy']}{setting}", "soft")]
        if len(one["sources"]) > 1:
            advice.append(Text(f"by source: {', '.join(f'{name} {count:,}' for name, count in one['sources'].items())}", "soft"))
        examples = Items([f"{example['where']}: {example['detail']}" for example in one["examples"]])
        parts.append(Section(title, [examples, *advice], "bad" if one["fatal"] else "warn"))
    return Section("Findings", parts)


def _show_controls(text: str) -> str:
    """Return a text with visible symbols for control characters other than line breaks and tabs."""
    return UNPRINTABLE.sub(lambda match: chr(0x2400 + ord(match.group())) if ord(match.group()) < 0x20 else "\ufffd", text)


def summarize_findings(plan: LaunchPlan, fatal: bool) -> str | None:
    """Return one line about the findings that refuse the run, or about those that the settings accept; None without any."""
    if plan.data is None:
        return None
    judged = findings.judge(findings.read(plan.data.cache_dir), plan.config.data.checks)
    # Kept documents come before dropped ones. The plan has its own note about truncated ones.
    shown = [one for one in judged if one.fatal == fatal and (fatal or one.finding.name != "truncated")]
    shown.sort(key=lambda one: one.action == "drop")
    texts = [
        f"{one.finding.title}: {one.finding.count:,}{', dropped' * (one.action == 'drop')}" for one in shown[:_MOST_FINDINGS]
    ]
    if more := len(shown) - len(texts):
        texts.append(format_count(more, "more finding"))
    # The command has the plan's file and overrides.
    hint = f"see them with: {launcher_command('data', *plan.provenance.overrides)}"
    return "; ".join([*texts, *(["the run would be refused"] if fatal else []), hint]) if texts else None
