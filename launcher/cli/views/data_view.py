"""The report on the data in a terminal: tables, findings, and rows with the trained parts marked."""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len
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
_BAR, _MIN_BAR = 40, 5
_BINS = "tokens, up to"
_LABEL_WIDTH = 13
# Rounding error of token shares.
_ROUNDING = 1e-6
# What happens to the documents of a finding that does not reject the run, if its setting does not say so.
_OUTCOMES = {"dropped": "not trained", "truncated": "trained without the rest"}


def show(report: dict[str, Any]) -> None:
    """Print the report of launcher.data.report."""
    report = {key: value if key == "shown" else _printable(value) for key, value in report.items()}
    console = Console(highlight=False, width=formatting.terminal_columns() or _PIPE_WIDTH)
    for label, value in summary_rows(report):
        _print_text(console, f"{label:<{_LABEL_WIDTH}}{value}", continued_at=_LABEL_WIDTH)
    _print_sources(console, report)
    for line in source_notes(report):
        _print_text(console, line, continued_at=2)
    console.print()
    _print_lengths(console, report)
    _print_findings(console, report["findings"])
    for number, shown in enumerate(report["shown"], start=1):
        _print_row(console, shown, number)


def number_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the header, and a row of cells for each source, for a mixture of several, and for the held-out split."""
    header = [
        *("source", "read", "dropped", "documents", "cut", "split", "end of turn", "median", "longest"),
        *("epochs", "rows", "tokens", "share", "trained", "filled", "padding"),
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
        *("" if share is None else f"{counts[key]:.2%}" for key in ("fill_frac", "padding_frac")),
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
    alike = " of about the same length" if report["group_by_length"] else ""
    batches = f"micro-batches of {up_to}{report['padded_rows']:,}{alike}"
    return f"one document each; {most}{report['padding_frac']:.2%} padding in {batches}"


def source_columns(report: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the rows of `number_rows` as two tables, for documents and for tokens: a single table would be too wide."""
    rows = number_rows(report)
    split = rows[0].index("epochs")
    return [row[:split] for row in rows], [[row[0], *row[split:]] for row in rows]


def _print_sources(console: Console, report: dict[str, Any]) -> None:
    """Print the tables of the sources; if they are too wide, print a row for each number and a column for each source."""
    tables = [rows for rows in source_columns(report) if len(rows) > 1]
    if all(_table_width(rows) <= console.width for rows in tables):
        for rows in tables:
            console.print()
            console.print(_source_table(rows))
        return
    header, *sources = number_rows(report)
    while sources:
        # Print as many sources side by side as fit.
        num_fitting = len(sources)
        while num_fitting > 1 and _table_width([header, *sources[:num_fitting]], is_transposed=True) > console.width:
            num_fitting -= 1
        shown, sources = sources[:num_fitting], sources[num_fitting:]
        console.print()
        console.print(_source_table([list(cells) for cells in zip(header, *shown, strict=True)]))


def _table_width(rows: list[list[str]], is_transposed: bool = False) -> int:
    columns = rows if is_transposed else list(zip(*rows, strict=True))
    return sum(max(map(cell_len, cells)) for cells in columns) + 2 * (len(columns) - 1)


def _source_table(rows: list[list[str]]) -> Table:
    header, *lines = rows
    result = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        result.add_column(escape(name), justify="left" if i == 0 else "right", no_wrap=True)
    for line in lines:
        result.add_row(*(escape(cell) for cell in line), style="bold" if line[0] == "mixture" else "")
    return result


def _print_text(console: Console, text: str, continued_at: int, indent: int = 0, style: str = "") -> None:
    """Print a text, wrapped between words in a terminal; in a pipe or a file, lines are not wrapped."""
    for line in formatting.wrap([" " * indent + text], continued_at):
        console.print(Text(line, style=style), soft_wrap=True)


def source_notes(report: dict[str, Any]) -> list[str]:
    """Return lines with information about the sources that has no column in the tables."""
    return [
        *parts_taken(report),
        *unused(report),
        *not_evaluated(report),
        *moved(report),
        *left_out(report),
        *unread_keys(report),
        *completions(report),
    ]


def parts_taken(report: dict[str, Any]) -> list[str]:
    """Return a line for each source of which an epoch takes only a fraction of a pass."""
    lines = []
    for source in report["sources"]:
        part = source["epochs"] % 1
        if source["documents"] and _ROUNDING < part < 1 - _ROUNDING:
            taken = f"{source['epochs']:.2f} passes over it in each epoch of the run"
            lines.append(f"{source['name']}: {taken}; the partial pass uses the same documents in every epoch")
    return lines


def unused(report: dict[str, Any]) -> list[str]:
    """Return a line for each source with documents that are not in the mixture."""
    lines = []
    for source in report["sources"]:
        if not source["is_read"]:
            lines.append(f"{source['name']}: not read because its weight is 0")
        elif count := source["unused_documents"]:
            num_documents = source["read_documents"] - source["dropped_documents"]
            limits = " and ".join(source["limited_by"])
            lines.append(
                f"{source['name']}: {count:,} of {num_documents:,} documents are not in the mixture because of its {limits}"
            )
    return lines


def not_evaluated(report: dict[str, Any]) -> list[str]:
    """Return a line if the held-out split has fewer documents than were held out, apart from dropped ones."""
    held_out = report["held_out"]
    if not (count := held_out["unused_documents"]):
        return []
    num_documents = held_out["read_documents"] - held_out["dropped_documents"]
    limit = f"data.eval_max_rows={held_out['max_rows']}"
    return [f"held out: {count:,} of {num_documents:,} documents are neither evaluated nor trained on because of {limit}"]


def moved(report: dict[str, Any]) -> list[str]:
    """Return a line for each source that was moved since the cache was built."""
    return [
        visible(f"{source['name']}: paths are those from which the cache was built, in {source['built_from']}")
        for source in report["sources"]
        if source["path"] != source["built_from"]
    ]


def left_out(report: dict[str, Any]) -> list[str]:
    """Return a line for each source with files that are not read."""
    lines = []
    for source in report["sources"]:
        if more := source["num_left_out"]:
            names = ", ".join(source["left_out"]) + (", ..." if more > len(source["left_out"]) else "")
            lines.append(visible(f"{source['name']}: files read: {source['num_files']:,}, left out: {more:,} ({names})"))
    return lines


def unread_keys(report: dict[str, Any]) -> list[str]:
    """Return a line for each source whose rows have keys that are not read, the most frequent first."""
    lines = []
    for source in report["sources"]:
        if counts := source["unread_keys"]:
            keys = ", ".join(f"{key} ({count:,})" for key, count in counts.items())
            others = f", and {source['num_other_unread_keys']:,} more" if source["num_other_unread_keys"] else ""
            lines.append(visible(f"{source['name']}: unread keys (rows): {keys}{others}"))
    return lines


def completions(report: dict[str, Any]) -> list[str]:
    """Return lines for each source with prompts and completions (or questions and answers) that describe how they are written."""
    lines = []
    for source in report["sources"]:
        name, as_chat = source["name"], source["completions_as_chat"]
        as_text = source["completions"] - as_chat
        if as_chat:
            lines.append(
                f"{name}: {as_chat:,} prompts and completions are written with the chat template, as the user's message and the "
                "assistant's answer (completions: text in data.sources joins them as they are)"
            )
        if as_text:
            lines.append(
                f"{name}: {as_text:,} prompts and completions are joined as they are, without the chat template "
                "(completions: chat in data.sources writes them with it)"
            )
    return lines


def length_bins(report: dict[str, Any]) -> tuple[list[int], list[tuple[str, list[int]]]]:
    """Return the upper ends of all length bins, and the documents of each source in them."""
    ends = [bin_["max_tokens"] for bin_ in report["length_histogram"]]
    series = []
    for source in report["sources"]:
        if source["documents"]:
            counts = {bin_["max_tokens"]: bin_["documents"] for bin_ in source["length_histogram"]}
            series.append((source["name"], [counts.get(end, 0) for end in ends]))
    return ends, series


def _print_lengths(console: Console, report: dict[str, Any]) -> None:
    """Print a bar for each length bin of the mixture, after each source's counts if there are several sources and they fit."""
    ends, series = length_bins(report)
    totals = [sum(counts) for counts in zip(*(counts for _, counts in series), strict=True)]
    counted = [*series, ("mixture", totals)] if len(series) > 1 else [("documents", totals)]
    if (longest := _bar_width(console, counted)) < _MIN_BAR:
        counted = [("documents", totals)]
        longest = max(_MIN_BAR, _bar_width(console, counted))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(_BINS, justify="right", no_wrap=True)
    for name, _ in counted:
        table.add_column(escape(name), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for i, end in enumerate(ends):
        bar = "█" * -(-longest * totals[i] // max(totals))
        table.add_row(f"{end:,}", *(f"{counts[i]:,}" for _, counts in counted), bar)
    console.print(table)
    console.print()


def _bar_width(console: Console, counted: list[tuple[str, list[int]]]) -> int:
    """Return the width of the longest bar beside the columns of `counted`."""
    columns = sum(2 + max(cell_len(name), len(f"{max(counts):,}")) for name, counts in counted)
    return min(_BAR, console.width - len(_BINS) - columns - 2)


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
            _print_text(console, f"{visible(example['where'])}: {visible(example['detail'])}", continued_at=8, indent=6)
        advice = f"{finding['meaning']}. Remedy: {finding['remedy']} (currently {finding['setting']}={finding['action']})"
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
    of, setting = (" of a source", "") if finding["limit_setting"] is None else ("", f" ({finding['limit_setting']})")
    return f"{kept}; more than {100 * finding['limit']:g}%{of} would refuse the run{setting}"


def _print_row(console: Console, shown: dict[str, Any], number: int) -> None:
    documents = shown["documents"]
    tokens = sum(document["tokens"] for document in documents)
    opening, closing = ("", "") if _has_colors(console) else TRAINED_MARKS
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


def _has_colors(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def visible(text: str) -> str:
    """Return a text with visible symbols for control characters other than line breaks and tabs."""
    return UNPRINTABLE.sub(lambda match: chr(0x2400 + ord(match.group())) if ord(match.group()) < 0x20 else "\ufffd", text)
