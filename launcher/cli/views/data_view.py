"""The report on the data in a terminal: tables, findings, and rows with the trained parts marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from launcher.cli import formatting
from launcher.data.checks.findings import share_text
from launcher.errors import UNPRINTABLE, printable
from launcher.plan.quantities import format_count, format_size

# Marks for trained text without colors: in a pipe, in a file, or with NO_COLOR.
TRAINED_MARKS = ("⟦", "⟧")
_TRAINED_STYLE = "bold green"
_UNTRAINED_STYLE = "dim"
_PIPE_WIDTH = 160
_LABEL_WIDTH = 13
# Rounding error of token shares.
_ROUNDING = 1e-6
# What happens to the documents of a finding that does not reject the run, if its setting does not say so.
_OUTCOMES = {"dropped": "not trained", "truncated": "trained without the rest"}


class _PipeConsole(Console):
    """A console without rich's own exit code for a reader that has gone: the command ends with 141, as others do."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show(report: dict[str, Any]) -> None:
    """Print the report of launcher.data.report."""
    report = {key: value if key == "shown" else _printable(value) for key, value in report.items()}
    console = _PipeConsole(highlight=False, width=formatting.terminal_columns() or _PIPE_WIDTH)
    for label, value in summary_rows(report):
        _print_text(console, f"{label:<{_LABEL_WIDTH}}{value}", continued_at=_LABEL_WIDTH)
    for rows in source_columns(report):
        if len(rows) > 1:
            console.print()
            console.print(_source_table(rows))
    for line in source_notes(report):
        _print_text(console, line, continued_at=2)
    console.print()
    _print_findings(console, report["findings"])
    for number, shown in enumerate(report["shown"], start=1):
        _print_row(console, shown, number)


def number_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the header, and a row of cells for each source, for a mixture of several, and for the held-out split."""
    header = [
        *("source", "read", "dropped", "documents", "cut", "split", "end of turn", "median", "longest"),
        *("epochs", "rows", "tokens", "share", "trained"),
    ]
    lines = [
        [source["name"], *_of_documents(source), f"{source['epochs']:.2f}", *_of_tokens(source, source["frac"])]
        for source in report["sources"]
        if source["read_documents"]
    ]
    if len(lines) > 1:
        lines.append(["mixture", *_of_documents(report), "", *_of_tokens(report, 1)])
    if report["held_out"]["read_documents"]:
        lines.append(["held out", *_of_documents(report["held_out"]), "", *_of_tokens(report["held_out"], None)])
    return [header, *lines]


def _of_documents(counts: dict[str, Any]) -> list[str]:
    keys = ("read_documents", "dropped_documents", "documents", "truncated_documents", "split_documents")
    ends = counts.get("documents_with_turn_end")
    lengths = counts["document_tokens"] or {"median": 0, "max": 0}
    return [
        *(f"{counts[key]:,}" if key in counts else "" for key in keys),
        "" if ends is None else _percent(ends, counts["documents"]),
        f"{lengths['median']:,}",
        f"{lengths['max']:,}",
    ]


def _percent(part: int, whole: int) -> str:
    """Return a share in percent; only the whole is shown as 100%."""
    return "100%" if part >= whole else f"{min(part / whole, 0.999):.1%}"


def _of_tokens(counts: dict[str, Any], share: float | None) -> list[str]:
    """Return cells about tokens; `share` is the share of the mixture's tokens, None outside the mixture."""
    return [
        f"{counts['rows']:,}",
        f"{counts['tokens']:,}",
        "" if share is None else f"{share:.1%}",
        f"{counts['trained_frac']:.1%}",
    ]


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return labels and values that describe the whole cache."""
    cut = f"; truncated: {format_count(report['truncated_tokens'], 'token')}" if report["truncated_tokens"] else ""
    too_long = report["too_long_documents"]
    excluded = report["excluded_documents"]
    by_checks = report["dropped_documents"] - too_long - excluded
    dropped = f"{by_checks:,} documents by data.checks, {too_long:,} that are longer than a row"
    dropped += f", {excluded:,} by data.exclude" if excluded else ""
    return [
        ("rows", f"{report['rows']:,} of up to {row_width(report)}, {_filled(report)}"),
        (
            "tokens",
            f"{report['tokens']:,}, of which {report['trained_tokens']:,} ({report['trained_frac']:.1%}) are trained{cut}",
        ),
        ("end of turn", f"trained in {report['documents_with_turn_end']:,} of {report['documents']:,} documents{_ends(report)}"),
        *([("dropped", dropped)] if report["dropped_documents"] else []),
        *(("evaluation", _eval_set(one)) for one in report["eval_sets"]),
        *(("warning", warning) for warning in report["warnings"]),
        ("cache", f"{report['cache_dir']} ({format_size(report['cache_bytes'])})"),
    ]


def _eval_set(counts: dict[str, Any]) -> str:
    documents = (
        f"{counts['documents']:,} of {counts['read_documents']:,} documents in {format_count(counts['rows'], 'packed row')}"
    )
    return f"set {counts['name']}: {documents}, {counts['trained_tokens']:,} of {counts['tokens']:,} tokens are scored"


def _ends(report: dict[str, Any]) -> str:
    """Return which tokens end turns, and whether the model stops at them."""
    meanings = {
        True: "the model stops there",
        False: "the model does not stop there, but the generation settings of the export do",
    }
    return "".join(f"; {end['token']} (token {end['id']}): {meanings[end['stops']]}" for end in report["turn_ends"])


def row_width(report: dict[str, Any]) -> str:
    """Return the length of the longest row, and data.max_length if all rows are shorter."""
    most, width = report["max_length"], report["row_tokens"]
    return format_count(width, "token") + (f" (data.max_length is {most:,})" if width < most else "")


def _filled(report: dict[str, Any]) -> str:
    if report["packing"]:
        return f"packed, filled to {report['fill_frac']:.2%} ({report['padding_frac']:.2%} padding)"
    most, up_to = ("at most ", "up to ") if report["padding_is_most"] else ("", "")
    batches = f"micro-batches of {up_to}{report['padded_rows']:,} of about the same length"
    return f"one document each; {most}{report['padding_frac']:.2%} padding in {batches}"


def source_columns(report: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the rows of `number_rows` as two tables, for documents and for tokens: a single table would be too wide."""
    rows = number_rows(report)
    split = rows[0].index("epochs")
    return [row[:split] for row in rows], [[row[0], *row[split:]] for row in rows]


def _source_table(rows: list[list[str]]) -> Table:
    header, *lines = rows
    result = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        result.add_column(escape(name), justify="left" if i == 0 else "right")
    for line in lines:
        result.add_row(*(escape(cell) for cell in line), style="bold" if line[0] == "mixture" else "")
    return result


def _print_text(console: Console, text: str, continued_at: int, indent: int = 0, style: str = "") -> None:
    """Print a text, wrapped between words in a terminal; in a pipe or a file, lines are not wrapped."""
    for line in formatting.wrap([" " * indent + text], continued_at):
        console.print(Text(line, style=style), soft_wrap=True)


def source_notes(report: dict[str, Any]) -> list[str]:
    """Return lines with information about the sources that has no column in the tables."""
    notes = [note for source in report["sources"] for note in _notes(source)]
    held_out = report["held_out"]
    if count := held_out["unused_documents"]:
        num_documents = held_out["read_documents"] - held_out["dropped_documents"]
        limit = f"data.eval_max_rows={held_out['max_rows']}"
        notes.append(
            f"held out: {count:,} of {num_documents:,} documents are neither evaluated nor trained on because of {limit}"
        )
    return [visible(note) for note in notes]


def _notes(source: dict[str, Any]) -> Iterator[str]:
    name, part = source["name"], source["epochs"] % 1
    if source["documents"] and _ROUNDING < part < 1 - _ROUNDING:
        taken = f"{source['epochs']:.2f} passes over it in each epoch of the run"
        yield f"{name}: {taken}; the partial pass uses the same documents in every epoch"
    if not source["is_read"]:
        yield f"{name}: not read because its weight is 0"
    elif count := source["unused_documents"]:
        num_documents = source["read_documents"] - source["dropped_documents"]
        limits = " and ".join(source["limited_by"])
        yield f"{name}: {count:,} of {num_documents:,} documents are not in the mixture because of its {limits}"
    if more := source["num_left_out"]:
        names = ", ".join(source["left_out"]) + (", ..." if more > len(source["left_out"]) else "")
        yield f"{name}: files read: {source['num_files']:,}, left out: {more:,} ({names})"
    if counts := source["unread_keys"]:
        keys = ", ".join(f"{key} ({count:,})" for key, count in counts.items())
        others = f", and {source['num_other_unread_keys']:,} more" if source["num_other_unread_keys"] else ""
        yield f"{name}: unread keys (rows): {keys}{others}"
    if as_chat := source["completions_as_chat"]:
        how = "with the chat template, as the user's message and the assistant's answer"
        yield f"{name}: {as_chat:,} prompts and completions are written {how} (completions: text in data.sources joins them)"
    if as_text := source["completions"] - as_chat:
        how = "without the chat template (completions: chat in data.sources writes them with it)"
        yield f"{name}: {as_text:,} prompts and completions are joined as they are, {how}"


def _print_findings(console: Console, findings: list[dict[str, Any]]) -> None:
    if not findings:
        console.print("findings: none", style="green")
        return
    console.print("findings", style="bold")
    for finding in findings:
        style = "bold red" if finding["fatal"] else "yellow"
        title = f"{finding['count']:,} of {finding['total']:,} ({share_text(finding['share'])})  {finding['title']}"
        title = f"{title}: {outcome(finding)}"
        _print_text(console, title, continued_at=6, indent=2, style=style)
        for example in finding["examples"]:
            _print_text(console, f"{example['where']}: {example['detail']}", continued_at=8, indent=6)
        setting = f" (currently {finding['setting']}={finding['action']})" if finding["setting"] else ""
        advice = f"{finding['meaning']}. Remedy: {finding['remedy']}{setting}"
        _print_text(console, advice, continued_at=6, indent=6, style="dim")


def _printable(value: Any) -> Any:
    """Return a JSON value with all its texts made printable: file and source names, details of findings."""
    if isinstance(value, dict):
        return {_printable(key): _printable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value


def outcome(finding: dict[str, Any]) -> str:
    """Return what happens to a finding's documents, or to the run."""
    if finding["fatal"]:
        return "the run is refused"
    if finding["action"] == "drop":
        return "dropped"
    kept = _OUTCOMES.get(finding["name"], "kept")
    if finding["action"] == "keep":
        return kept
    of = " of a source" if finding["name"] == "no_turn_end" else ""
    return f"{kept}; more than {100 * finding['limit']:g}%{of} would refuse the run"


def _print_row(console: Console, shown: dict[str, Any], number: int) -> None:
    documents = shown["documents"]
    tokens = sum(document["tokens"] for document in documents)
    has_colors = console.color_system is not None and not console.no_color
    opening, closing = ("", "") if has_colors else TRAINED_MARKS
    legend = f"trained between {opening} and {closing}" if opening else f"trained in [{_TRAINED_STYLE}]green[/]"
    console.print()
    title = f"row {shown['row']:,}, {format_count(tokens, 'token')}" if shown["whole"] else f"document {number}"
    console.print(f"[bold]{title}[/] ({legend})", soft_wrap=True)
    for position, document in enumerate(documents, start=1):
        order = f"document {position} of {len(documents)}, " if shown["whole"] else ""
        console.rule(
            f"{order}{escape(document['source'])}, {format_count(document['tokens'], 'token')}", align="left", style="blue"
        )
        line = Text()
        for part in document["parts"]:
            text = visible(part["text"])
            if part["trained"]:
                line.append(f"{opening}{text}{closing}", style=_TRAINED_STYLE)
            else:
                line.append(text, style=_UNTRAINED_STYLE)
        console.print(line, soft_wrap=True)


def visible(text: str) -> str:
    """Return a text with visible symbols for control characters other than line breaks and tabs."""
    return UNPRINTABLE.sub(lambda match: chr(0x2400 + ord(match.group())) if ord(match.group()) < 0x20 else "\ufffd", text)
