"""One self-contained HTML page: tables, and charts as inline SVG. No script, no font and no file from elsewhere.

Every text that is handed in is escaped; what the functions return is HTML and goes into `page`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from launcher.errors import ConfigError

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 20, 34, 50
_COLOURS = 8

_STYLE = """
:root {
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --soft: #5b6470; --line: #d9dee5;
  --good: #1a7f4b; --bad: #c0362c; --warn: #9a6700; --trained: #d3f0dd;
  --c0: #2f6fde; --c1: #e0802b; --c2: #2a9d6f; --c3: #b5458f; --c4: #7a5cd1; --c5: #1f9bb5; --c6: #b8952a; --c7: #70757d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1d2126; --ink: #e6e9ee; --soft: #9aa4b1; --line: #353c45;
    --good: #4cc38a; --bad: #ff7b70; --warn: #e0b04a; --trained: #1c4a31;
    --c0: #6ea1ff; --c1: #f0a35e; --c2: #55c99a; --c3: #e07fbf; --c4: #a893f0; --c5: #58c4dc; --c6: #d9bb5c; --c7: #a0a6af;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 32px 24px 64px; max-width: 1080px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
p { margin: 4px 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.warn { color: var(--warn); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.card { background: var(--panel); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 21px; }
.card span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td { overflow-wrap: anywhere; }
td:first-child { min-width: 90px; }
td:last-child:not(.number) { min-width: 275px; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0; max-width: 620px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 28px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 15px; }
svg .value { fill: var(--ink); }
svg .grid { stroke: var(--line); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
pre {
  background: var(--panel); border-radius: 8px; padding: 12px 14px; margin: 6px 0; color: var(--soft);
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
pre mark { background: var(--trained); color: var(--ink); border-radius: 2px; }
"""
# Nothing is fetched and nothing runs, whatever a text that is shown may hold.
_HEAD = """
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""


@dataclass(frozen=True)
class Series:
    """A named list of values, one for each point or label of a chart."""

    name: str
    values: Sequence[float]


def require_place(file: Path) -> Path:
    """Refuse a file that cannot be written, or that holds something other than such a page, which would be lost.

    Raises:
        ConfigError: about `--html`.
    """
    try:
        writable = not file.is_dir() and os.access(file if file.exists() else file.absolute().parent, os.W_OK)
        foreign = writable and file.exists() and file.stat().st_size > 0 and _HEAD not in _beginning(file)
    except OSError:
        writable = foreign = False
    if not writable:
        what, remedy = "the page cannot be written there", "name a file in a folder of yours"
        raise ConfigError(what, where="--html", value=str(file), remedy=remedy)
    if foreign:
        what = "the file is no page that the launcher wrote, and stays as it is"
        raise ConfigError(what, where="--html", value=str(file), remedy="name another file")
    return file


def write(file: Path, content: str) -> None:
    """Write a page where `require_place` has nothing against it.

    Raises:
        ConfigError: also where storage takes none.
    """
    try:
        # What UTF-8 has no place for, as half a surrogate pair of a file's name, is known before the page before is gone.
        require_place(file).write_bytes(content.encode(errors="xmlcharrefreplace"))
    except OSError as error:
        what = f"the page cannot be written: {error.strerror}"
        raise ConfigError(what, where="--html", value=str(file), remedy="name a file on another disk") from None


def page(title: str, subtitle: str, body: Sequence[str]) -> str:
    """The whole page; `body` are pieces of HTML from the functions below."""
    content = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head>{_HEAD}<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n'
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>\n{content}\n</body></html>\n'
    )


def _beginning(file: Path) -> str:
    with open(file, encoding="utf-8", errors="replace") as opened:
        return opened.read(1000)


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "soft") -> str:
    """`kind` is soft, good, bad or warn."""
    return f'<p class="{kind}">{escape(text)}</p>'


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """A few numbers, (value, what it is), that are seen first."""
    inner = "".join(f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in facts)
    return f'<div class="cards">{inner}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells of text, where a line break begins a line, under a header or none. The columns `numbers` stand to the right."""

    def cell(tag: str, text: str, column: int) -> str:
        kind = ' class="number"' if column in numbers else ""
        return f"<{tag}{kind}>{escape(text).replace(chr(10), '<br>')}</{tag}>"

    cells = "".join(cell("th", text, i) for i, text in enumerate(header))
    head = f"<thead><tr>{cells}</tr></thead>" if header else ""
    body = "".join("<tr>" + "".join(cell("td", text, i) for i, text in enumerate(row)) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def marked(parts: Sequence[tuple[str, bool]]) -> str:
    """A text in its own line breaks; the parts with True are marked."""
    return "<pre>" + "".join(f"<mark>{escape(text)}</mark>" if mark else escape(text) for text, mark in parts) + "</pre>"


def side_by_side(*figures: str) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def stacked_bars(title: str, labels: Sequence[str], series: Sequence[Series], x_label: str, y_label: str) -> str:
    """One bar a label, the series on top of each other: a histogram where the labels are bins."""
    highest = max((sum(column) for column in zip(*(one.values for one in series), strict=True)), default=0)
    ticks = _ticks(0, highest)
    y = _scale(0, ticks[-1], HEIGHT - _BOTTOM, _TOP)
    step = (WIDTH - _LEFT - _RIGHT) / max(1, len(labels))
    shapes = []
    for i, label in enumerate(labels):
        below = 0.0
        for number, one in enumerate(series):
            value = one.values[i]
            if value:
                top = y(below + value)
                tip = f"<title>{escape(f'{one.name}, {label}: {_number(value)}')}</title>"
                shapes.append(
                    f'<rect x="{_LEFT + i * step + step * 0.1:.1f}" y="{top:.1f}" width="{step * 0.8:.1f}" '
                    f'height="{y(below) - top:.1f}" fill="{_colour(number)}">{tip}</rect>'
                )
            below += value
        if i % -(-len(labels) // 12) == 0:
            shapes.append(_text(_LEFT + (i + 0.5) * step, HEIGHT - _BOTTOM + 18, label, "middle"))
    return _figure(title, _grid(ticks, y) + shapes, x_label, y_label, [one.name for one in series])


def bars(title: str, rows: Sequence[tuple[str, float, str]], highest: float | None = None) -> str:
    """One horizontal bar for each (label, value, what is written behind it)."""
    most = highest if highest is not None else max((value for _, value, _ in rows), default=1) or 1
    height, left, right = 32, 190, 190
    shapes = []
    for i, (label, value, note) in enumerate(rows):
        width = (WIDTH - left - right) * min(1.0, value / most)
        middle = i * height + 19
        shapes.append(_text(left - 10, middle, _shortened(label, 25), "end"))
        shapes.append(
            f'<rect x="{left}" y="{i * height + 5}" width="{max(1.0, width):.1f}" height="19" rx="2" fill="{_colour(i)}"/>'
        )
        shapes.append(_text(left + max(1.0, width) + 8, middle, note, "start", "value"))
    return _svg(title, shapes, len(rows) * height + 6, [])


def lines(
    title: str, x: Sequence[Sequence[float]], series: Sequence[Series], x_label: str, y_label: str, log_x: bool = False
) -> str:
    """Curves; `x` has the positions of each series. A logarithmic axis takes positions above 0."""
    points = [value for one in x for value in one]
    values = [value for one in series for value in one.values if math.isfinite(value)]
    if not points or not values:
        return paragraph(f"{title}: nothing to draw")
    y_ticks = _ticks(min(values), max(values))
    y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP)
    if log_x:
        low, high = math.floor(math.log2(min(points))), math.ceil(math.log2(max(points)))
        position = _scale(low, max(high, low + 1), _LEFT, WIDTH - _RIGHT)
        places = [(position(power), _number(2.0**power)) for power in range(low, high + 1, -(-(high - low + 1) // 10))]
    else:
        x_ticks = _ticks(min(points), max(points))
        position = _scale(x_ticks[0], x_ticks[-1], _LEFT, WIDTH - _RIGHT)
        places = [(position(tick), _number(tick)) for tick in x_ticks]
    shapes = [_text(at, HEIGHT - _BOTTOM + 18, label, "middle") for at, label in places]
    for number, (xs, one) in enumerate(zip(x, series, strict=True)):
        pairs = [(position(math.log2(a) if log_x else a), y(b)) for a, b in zip(xs, one.values, strict=True) if math.isfinite(b)]
        tip = f"<title>{escape(one.name)}</title>"
        if len(pairs) == 1:
            # A line of one point would not be seen.
            (a, b), colour = pairs[0], _colour(number)
            shapes.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}">{tip}</circle>')
            continue
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in pairs)
        shapes.append(f'<polyline class="line" stroke="{_colour(number)}" points="{path}">{tip}</polyline>')
    return _figure(title, _grid(y_ticks, y) + shapes, x_label, y_label, [one.name for one in series])


def _figure(title: str, shapes: list[str], x_label: str, y_label: str, names: Sequence[str]) -> str:
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    labels = [_text(middle, HEIGHT - 6, x_label, "middle"), _text(4, 15, y_label, "start")]
    return _svg(title, shapes + labels, HEIGHT, names if len(names) > 1 else [])


def _svg(title: str, shapes: list[str], height: int, names: Sequence[str]) -> str:
    key = "".join(f'<span><i style="background:{_colour(i)}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    legend = f'<div class="key">{key}</div>' if key else ""
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(shapes)}</svg>'
    return f"<figure>{heading(title, 3)}{legend}{drawing}</figure>"


def _grid(ticks: Sequence[float], y: Callable[[float], float]) -> list[str]:
    shapes = []
    for tick in ticks:
        shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        shapes.append(_text(_LEFT - 8, y(tick) + 4, _number(tick), "end"))
    return shapes


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    css = f' class="{kind}"' if kind else ""
    return f'<text{css} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _colour(number: int) -> str:
    return f"var(--c{number % _COLOURS})"


def _scale(low: float, high: float, at_low: float, at_high: float) -> Callable[[float], float]:
    return lambda value: at_low + (value - low) / (high - low) * (at_high - at_low)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from below `low` to above `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    """As short as it can be read: 1.5k, 20M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            divisor = 1e3 if unit == "k" else factor
            return f"{value / divisor:.4g}{unit}"
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
