"""What verbs show, as data: sections of rows, tables, texts and charts. terminal.py and html.py lay them out and escape them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

# How a text is meant; colored on a page, and in a terminal with colors.
Tone = Literal["", "soft", "good", "warn", "bad"]


@dataclass(frozen=True)
class Rows:
    """Pairs of a label and a value, which may have several lines; without `wraps`, values stay whole, to be copied."""

    kind: ClassVar = "rows"
    rows: Sequence[tuple[str, str]]
    wraps: bool = True


@dataclass(frozen=True)
class Cards:
    """The main numbers, as pairs of a label and a value; only pages show them."""

    kind: ClassVar = "cards"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; the columns with the indices `numbers` are aligned to the right."""

    kind: ClassVar = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[int] = ()


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Items:
    """A list of short texts."""

    kind: ClassVar = "items"
    texts: Sequence[str]
    tone: Tone = ""


@dataclass(frozen=True)
class Commands:
    """Lines to copy into a shell, which are never wrapped."""

    kind: ClassVar = "commands"
    lines: Sequence[str]


@dataclass(frozen=True)
class MarkedText:
    """A text shown as it is, of parts (text, is_marked): the marked ones are trained."""

    kind: ClassVar = "marked"
    parts: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class ChartCurve:
    """A named curve through the points (x[i], y[i]); values that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class LineChart:
    """Curves over a common axis."""

    title: str
    curves: Sequence[ChartCurve]
    x_label: str
    y_label: str = ""


@dataclass(frozen=True)
class BarChart:
    """A horizontal bar for each (label, value, text after the bar); `highest` is the value of a full bar."""

    title: str
    bars: Sequence[tuple[str, float, str]]
    highest: float | None = None


@dataclass(frozen=True)
class Charts:
    """Charts side by side; only pages show them."""

    kind: ClassVar = "charts"
    charts: Sequence[LineChart | BarChart]


@dataclass(frozen=True)
class Section:
    """Parts under a title, in order; a page folds the section if `is_folded`."""

    kind: ClassVar = "section"
    title: str
    parts: Sequence[Part]
    tone: Tone = ""
    is_folded: bool = False


Part: TypeAlias = Rows | Cards | Table | Text | Items | Commands | MarkedText | Charts | Section
