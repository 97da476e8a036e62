"""Charts as inline SVG in a `<figure>`. Texts are escaped; colours and fonts come from templates/page.css."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 20, 34, 50
_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """A named list of values, one for each point or label of a chart."""

    name: str
    values: Sequence[float]


def stacked_bars(title: str, labels: Sequence[str], series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """Draw one bar a label, the series on top of each other: a histogram where the labels are bins."""
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


def bars(title: str, rows: Sequence[tuple[str, float, str]], highest: float | None = None) -> Markup:
    """Draw one horizontal bar for each (label, value, what is written behind it)."""
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
) -> Markup:
    """Draw curves; `x` has the positions of each series. A logarithmic axis takes positions above 0."""
    points = [value for one in x for value in one]
    values = [value for one in series for value in one.values if math.isfinite(value)]
    if not points or not values:
        return Markup('<p class="soft">{}: nothing to draw</p>').format(title)
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


def _figure(title: str, shapes: list[str], x_label: str, y_label: str, names: Sequence[str]) -> Markup:
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    labels = [_text(middle, HEIGHT - 6, x_label, "middle"), _text(4, 15, y_label, "start")]
    return _svg(title, shapes + labels, HEIGHT, names if len(names) > 1 else [])


def _svg(title: str, shapes: list[str], height: int, names: Sequence[str]) -> Markup:
    key = "".join(f'<span><i style="background:{_colour(i)}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    legend = f'<div class="key">{key}</div>' if key else ""
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(shapes)}</svg>'
    # Every text above is escaped.
    return Markup(f"<figure><h3>{escape(title)}</h3>{legend}{drawing}</figure>")  # noqa: S704


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
