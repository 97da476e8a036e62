"""Sections as one self-contained HTML page, without scripts, fonts or external files: its charts are inline SVG."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from launcher.cli.render.sections import BarChart, LineChart, Part
from launcher.errors import ConfigError
from launcher.runs import atomic_files

# Part of every page (templates/page.html.jinja), and used to recognize one: nothing is fetched and nothing runs, whatever a text
# on the page contains.
_POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
# Longer words in tables may break after punctuation.
_LONG_WORD = 16
# Size of a line chart, and its margins beside the axes' labels. Colors and fonts come from templates/page.css.
_WIDTH, _HEIGHT = 480, 230
_RIGHT, _TOP, _BOTTOM = 20, 28, 44
# Width of a character in a label, in page.css's font.
_CHARACTER = 7.4
_COLORS = 8
# Values whose relative range is smaller than this are drawn as a constant.
_CONSTANT = 1e-5
# Units of tick labels.
_UNITS = {1e3: "k", 1e6: "M", 1e9: "G"}


def require_writable_page(file: Path) -> Path:
    """Reject an unwritable path, or a file that is not one of the launcher's pages."""
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        what, remedy = "the page cannot be written to this path", "choose a file in a folder that you can write to"
        raise ConfigError(what, where="--html", value=str(file), remedy=remedy)
    if file.is_file() and (content := file.read_text(errors="replace")) and _POLICY not in content:
        what = "the file is not a page of the launcher, so it is not overwritten"
        raise ConfigError(what, where="--html", value=str(file), remedy="name another file")
    return file


def write(file: Path, content: str) -> None:
    """Write a page to a path that `require_writable_page` accepts."""
    # UTF-8 cannot encode lone surrogates, which occur in some file names.
    encoded = content.encode(errors="xmlcharrefreplace")
    try:
        # Only this user can read it, because pages show data rows.
        atomic_files.write_bytes(require_writable_page(file).resolve(), encoded, mode=0o600)
    except OSError as error:
        what = f"the page cannot be written: {error.strerror}"
        raise ConfigError(what, where="--html", value=str(file), remedy="name a file on another disk") from None


def to_page(title: str, subtitle: str, parts: Sequence[Part]) -> str:
    """Return a page of sections; their texts are escaped."""
    # Imported here: most verbs write no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"cell": _format_cell, "draw": draw}
    return templates.get_template("page.html.jinja").render(title=title, subtitle=subtitle, parts=parts)


def _format_cell(text: object) -> Markup:
    """Return a table cell's text with its line breaks, and with places where long words such as paths may break."""

    def breakable(word: str) -> Markup:
        return escape(word) if len(word) <= _LONG_WORD else Markup("<wbr>").join(re.split(r"(?<=[/.,:;=_&?-])", word))

    lines = (Markup(" ").join(breakable(word) for word in line.split(" ")) for line in str(text).split("\n"))
    return Markup("<br>").join(lines)


def draw(chart: LineChart | BarChart) -> Markup:
    """Draw a chart."""
    return _draw_lines(chart) if isinstance(chart, LineChart) else _draw_bars(chart)


def _draw_bars(chart: BarChart) -> Markup:
    """Draw one horizontal bar for each label as HTML: texts keep their size on any screen."""
    most = chart.highest if chart.highest is not None else max((value for _, value, _ in chart.bars), default=1) or 1
    lines = []
    for number, (label, value, text) in enumerate(chart.bars):
        # A bar for a value above 0 is always visible.
        percent = min(100.0, max(0.4, 100 * value / most)) if value else 0.0
        track = f'<span class="track"><i style="width:{percent:.2f}%;background:{_color(number)}"></i></span>'
        lines.append(f'<span class="label">{escape(label)}</span>{track}<span class="value">{escape(text)}</span>')
    # Every text above is escaped.
    return Markup(f'<figure><h3>{escape(chart.title)}</h3><div class="bars">{"".join(lines)}</div></figure>')  # noqa: S704


def _draw_lines(chart: LineChart) -> Markup:
    """Draw curves with their axes, and with a legend if there are several."""
    points = [value for curve in chart.curves for value in curve.x]
    values = [value for curve in chart.curves for value in curve.y if math.isfinite(value)]
    if not points or not values:
        return Markup('<p class="soft">{}: nothing to draw</p>').format(chart.title)
    y_axis = _make_axis(values, _HEIGHT - _BOTTOM, _TOP)
    left = max(40.0, 8 + _CHARACTER * max(len(label) for _, label in y_axis.ticks))
    x_axis = _make_axis(points, left, _WIDTH - _RIGHT)
    shapes = []
    for at, label in y_axis.ticks:
        shapes.append(f'<line class="grid" x1="{left:.1f}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        shapes.append(_draw_text(left - 6, at + 4, label, "end"))
    for at, label in x_axis.ticks:
        # Labels stay within the chart.
        shapes.append(_draw_text(min(at, _WIDTH - _CHARACTER * len(label) / 2), _HEIGHT - _BOTTOM + 17, label, "middle"))
    for number, curve in enumerate(chart.curves):
        line = [(x_axis.position(a), y_axis.position(b)) for a, b in zip(curve.x, curve.y, strict=True) if math.isfinite(b)]
        tip = f"<title>{escape(curve.name)}</title>"
        if len(line) == 1:
            # A line with one point would be invisible.
            shapes += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{_color(number)}">{tip}</circle>' for a, b in line]
        else:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in line)
            shapes.append(f'<polyline class="line" stroke="{_color(number)}" points="{path}">{tip}</polyline>')
    shapes.append(_draw_text((left + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, chart.x_label, "middle"))
    shapes.append(_draw_text(2, 13, chart.y_label, "start"))
    names = (f'<span><i style="background:{_color(i)}"></i>{escape(one.name)}</span>' for i, one in enumerate(chart.curves))
    legend = f'<div class="key">{"".join(names)}</div>' if len(chart.curves) > 1 else ""
    title = escape(chart.title)
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{"".join(shapes)}</svg>'
    # Every text above is escaped.
    return Markup(f"<figure><h3>{title}</h3>{legend}{drawing}</figure>")  # noqa: S704


def _draw_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _color(number: int) -> str:
    return f"var(--c{number % _COLORS})"


@dataclass(frozen=True)
class _Axis:
    """Positions and labels of the ticks, and the function from a value to its position."""

    ticks: Sequence[tuple[float, str]]
    position: Callable[[float], float]


def _scale(low: float, high: float, at_low: float, at_high: float) -> Callable[[float], float]:
    return lambda value: at_low + (value - low) / (high - low) * (at_high - at_low)


def _make_axis(values: Sequence[float], at_low: float, at_high: float) -> _Axis:
    """Return an axis from `at_low` to `at_high` with round ticks; a constant has one tick, in the middle, with its value."""
    low, high = min(values), max(values)
    if high - low <= _CONSTANT * max(abs(low), abs(high)):
        half = abs(low) or 1.0
        position = _scale(low - half, low + half, at_low, at_high)
        return _Axis([(position(low), f"{low:,.6g}" if abs(low) < 1e6 else f"{low:,.0f}")], position)
    ticks = _choose_ticks(low, high, are_whole=all(float(value).is_integer() for value in values))
    position = _scale(ticks[0], ticks[-1], at_low, at_high)
    return _Axis([(position(tick), _label(tick)) for tick in ticks], position)


def _choose_ticks(low: float, high: float, are_whole: bool = False) -> list[float]:
    """Return about five round numbers from at most `low` to at least `high`, without fractions if `are_whole`."""
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    if are_whole:
        step = max(1, math.ceil(step))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def _label(tick: float) -> str:
    """Return a tick with the unit that shortens it, such as 20k or 1.5M."""
    text = f"{tick:,.8g}"
    units = (f"{tick / factor:,.8g}{unit}" for factor, unit in _UNITS.items() if abs(tick) >= factor)
    return min((text, *units), key=len)
