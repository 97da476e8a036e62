"""Formatting of texts, tables and JSON that all verbs share."""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from launcher.shell_commands import short_path

short = short_path


def as_json(value: Any, indent: int | None = 2) -> str:
    """Return strict JSON: NaN and infinity are null, as in metrics.jsonl."""

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {name: plain(value) for name, value in part.items()}
        if isinstance(part, list | tuple):
            return [plain(value) for value in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def terminal_columns() -> int | None:
    """Return the width for text layout: COLUMNS, or the terminal's width; None in a pipe or a file."""
    with suppress(ValueError):
        if (columns := int(os.environ.get("COLUMNS", ""))) > 0:
            return columns
    # A terminal that does not know its width reports 0.
    return (os.get_terminal_size(sys.stdout.fileno()).columns or None) if sys.stdout.isatty() else None


def wrap(lines: Sequence[str], indent: int) -> list[str]:
    """Wrap lines between words to the terminal's width, continued at `indent`; words such as paths stay whole."""
    columns = terminal_columns()
    if columns is None:
        return list(lines)
    wrapped = []
    for line in lines:
        text = line.lstrip(" ")
        wrapped += textwrap.wrap(
            text,
            max(columns, indent + 20),
            initial_indent=" " * (len(line) - len(text)),
            subsequent_indent=" " * indent,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return wrapped


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows under their columns' names; columns whose name begins with > are right-aligned.

    In a narrow terminal, the first column gets its own line above the others; if that is still too wide, each cell does.
    """
    # Another user's folder may have a name with line breaks, which would look like separate rows.
    rows = [[cell.replace("\n", "\\n") for cell in row] for row in rows]
    lines, width = _aligned(columns, rows), terminal_columns()
    if width is None or len(columns) < 3 or max(map(len, lines)) <= width:
        return lines
    others = _aligned(columns[1:], [row[1:] for row in rows])
    if max(map(len, others)) > width - 2:
        return _records([name.removeprefix(">") for name in columns], rows)
    firsts = (columns[0].removeprefix(">"), *(row[0] for row in rows))
    return [line for first, other in zip(firsts, others, strict=True) for line in (first, f"  {other}")]


def _records(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each cell, preceded by its column's name, and an empty line between rows."""
    indent = max(map(len, names)) + 2
    records = [wrap([f"{name:<{indent}}{cell}" for name, cell in zip(names, row, strict=True)], indent) for row in rows]
    return [line for record in records for line in (*record, "")][:-1]


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    names = [name.removeprefix(">") for name in columns]
    widths = [max(map(len, cells)) for cells in zip(names, *rows, strict=True)]
    sides = [">" if name.startswith(">") else "<" for name in columns]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in (names, *rows)
    ]
