"""Sections as text, for a terminal or a pipe: the only place that wraps, aligns and escapes what verbs print."""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launcher.cli.render.sections import Commands, Items, MarkedText, Part, Rows, Section, Table, Text
from launcher.errors import printable
from launcher.security.redaction import raw

# Columns of the labels of rows, including the space before the values; longer labels take more.
LABEL_COLUMNS = 12
# Marks for trained text without colors: in a pipe, in a file, or with NO_COLOR.
TRAINED_MARKS = ("⟦", "⟧")
_INDENT, _ITEM_INDENT = 2, 4
# Parameters of the escape sequences of tones, and of texts without one.
_TONES = {"": "", "soft": "2", "good": "32", "warn": "33", "bad": "1;31"}
_TITLE, _TRAINED, _UNTRAINED = "1", "1;32", "2"


def show(*parts: Part, label_columns: int = LABEL_COLUMNS) -> None:
    """Print parts on standard output, in colors if it is a terminal that has them."""
    has_colors = are_colors_shown()
    text = "\n".join(_Layout(columns(), label_columns, has_colors).lines(parts))
    # All texts are escaped already; standard output would escape the colors too.
    print(text, file=raw(sys.stdout) if has_colors else None, flush=True)


def to_lines(*parts: Part, label_columns: int = LABEL_COLUMNS) -> list[str]:
    """Return parts as lines without colors, as wide as the terminal."""
    return list(_Layout(columns(), label_columns, has_colors=False).lines(parts))


def columns() -> int | None:
    """Return the width for text layout: COLUMNS, or the terminal's width; None in a pipe or a file, where nothing is wrapped."""
    with suppress(ValueError):
        if (number := int(os.environ.get("COLUMNS", ""))) > 0:
            return number
    # A terminal that does not know its width reports 0.
    return (os.get_terminal_size(sys.stdout.fileno()).columns or None) if sys.stdout.isatty() else None


def are_colors_shown() -> bool:
    """Return whether standard output is a terminal with colors."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def read_yes(question: str) -> bool:
    """Ask on the terminal; no answer means no."""
    try:
        return input(f"{printable(question)} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def as_json(value: Any, indent: int | None = 2) -> str:
    """Return strict JSON: NaN and infinity are null, as in metrics.jsonl."""

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {name: plain(value) for name, value in part.items()}
        if isinstance(part, list | tuple):
            return [plain(value) for value in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=indent, allow_nan=False)


@dataclass(frozen=True)
class _Layout:
    """How parts become lines; `width` is None where nothing is wrapped."""

    width: int | None
    label_columns: int
    has_colors: bool

    def lines(self, parts: Sequence[Part], indent: int = 0) -> Iterator[str]:
        """Yield the lines of parts; an empty line separates sections, and what is under a title is indented."""
        for number, part in enumerate(parts):
            match part:
                case Section():
                    if number:
                        yield ""
                    if part.title:
                        yield from self._text(part.title, indent, color=_TONES[part.tone] or _TITLE)
                        if part.parts and isinstance(part.parts[0], Section):
                            yield ""
                    yield from self.lines(part.parts, indent + _INDENT if part.title else indent)
                case Rows():
                    label_columns = max([self.label_columns, *(len(label) + 1 for label, _ in part.rows)])
                    for label, value in part.rows:
                        first, *others = value.split("\n")
                        for line in (f"{label:<{label_columns}}{first}", *(" " * label_columns + line for line in others)):
                            if part.wraps:
                                yield from self._text(line, indent, label_columns)
                            else:
                                yield printable(" " * indent + line)
                case Table():
                    yield from (" " * indent + line if line else "" for line in self._table(part, indent))
                case Text():
                    for line in part.text.split("\n"):
                        yield from self._text(line, indent, color=_TONES[part.tone])
                case Items():
                    for text in part.texts:
                        yield from self._text(text, indent, _ITEM_INDENT, _TONES[part.tone])
                case Commands():
                    yield from (printable(" " * indent + line) for line in part.lines)
                case MarkedText():
                    begin, end = ("", "") if self.has_colors else TRAINED_MARKS
                    yield "".join(
                        self._colored(f"{begin}{printable(text)}{end}" if is_marked else printable(text), color)
                        for text, is_marked in part.parts
                        for color in [_TRAINED if is_marked else _UNTRAINED]
                    )

    def _text(self, line: str, indent: int, hanging: int = 0, color: str = "") -> Iterator[str]:
        for wrapped in wrap(printable(" " * indent + line), self.width, indent + hanging):
            yield self._colored(wrapped, color)

    def _colored(self, text: str, color: str) -> str:
        return f"\x1b[{color}m{text}\x1b[0m" if color and self.has_colors else text

    def _table(self, table: Table, indent: int) -> list[str]:
        """Return the rows under the columns' names.

        In a narrow terminal, the first column gets its own line above the others; if that is still too wide, each cell does.
        """
        # Another user's folder may have a name with line breaks, which would look like separate rows.
        rows = [[printable(cell).replace("\n", "\\n") for cell in row] for row in (table.header, *table.rows)]
        lines, width = _align(rows, table.numbers), None if self.width is None else self.width - indent
        if width is None or len(table.header) < 3 or max(map(len, lines)) <= width:
            return lines
        others = _align([row[1:] for row in rows], [number - 1 for number in table.numbers])
        if max(map(len, others)) <= width - _INDENT:
            return [line for row, other in zip(rows, others, strict=True) for line in (row[0], " " * _INDENT + other)]
        names, *cells = rows
        hanging = max(map(len, names)) + 2
        records = [
            [line for name, cell in zip(names, row, strict=True) for line in wrap(f"{name:<{hanging}}{cell}", width, hanging)]
            for row in cells
        ]
        return [line for record in records for line in (*record, "")][:-1]


def wrap(line: str, width: int | None, indent: int = 0) -> list[str]:
    """Wrap a line between words, continued at `indent`; words such as paths stay whole."""
    if width is None:
        return [line]
    text = line.lstrip(" ")
    return textwrap.wrap(
        text,
        max(width, indent + 20),
        initial_indent=" " * (len(line) - len(text)),
        subsequent_indent=" " * indent,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def _align(rows: Sequence[Sequence[str]], numbers: Collection[int]) -> list[str]:
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    sides = [">" if i in numbers else "<" for i in range(len(widths))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip() for row in rows
    ]
