"""Charts in a `<figure>`: inline SVG, or HTML for horizontal bars. Texts are escaped.

Colors and fonts come from templates/page.css.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 230
_RIGHT, _TOP, _BOTTOM = 20, 28, 44
# Width of a character in a label, in page.css's font.
_CHARACTER = 7.4
_COLORS = 8
# Values whose relative range is smaller than this are drawn as a constant.
_CONSTANT = 1e-5
# Units of tick labels: the largest label from which a unit is used, its factor, and its letter.
_UNITS = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
# Labels that need more decimal places are written without a unit.
_UNIT_DIGITS = 2
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A named list of values, one for each point or label of a chart."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True)
class _Axis:
    """Positions and labels of the ticks, and the function from a value to its position."""

    ticks: Sequence[tuple[float, str]]
    position: Callable[[float], float]


def bars(title: str, rows: Sequence[tuple[str, float, str]], highest: float | None = None) -> Markup:
    """Draw one horizontal bar for each (label, value, text after the bar), as HTML: texts keep their size on any screen."""
    most = highest if highest is not None else max((value for _, value, _ in rows), default=1) or 1
    lines = [
        f'<span class="label">{escape(label)}</span>'
        f'<span class="track"><i style="width:{_percent(value, most):.2f}%;background:{_color(i)}"></i></span>'
        f'<span class="value">{escape(text)}</span>'
        for i, (label, value, text) in enumerate(rows)
    ]
    # Every text above is escaped.
    return Markup(f'<figure><h3>{escape(title)}</h3><div class="bars">{"".join(lines)}</div></figure>')  # noqa: S704


def _percent(value: float, most: float) -> float:
    """Return the length of a bar; a bar for a value above 0 is always visible."""
    return min(100.0, max(0.4, 100 * value / most)) if value else 0.0


def lines(title: str, x: Sequence[Sequence[float]], series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """Draw curves; `x` has the positions of each series."""
    points = [value for one in x for value in one]
    values = [value for one in series for value in one.values if math.isfinite(value)]
    if not points or not values:
        return Markup('<p class="soft">{}: nothing to draw</p>').format(title)
    y_axis = _linear_axis(values, HEIGHT - _BOTTOM, _TOP)
    left = _left_margin(y_axis)
    x_axis = _linear_axis(points, left, WIDTH - _RIGHT)
    shapes = [_x_label(at, label) for at, label in x_axis.ticks]
    for number, (xs, one) in enumerate(zip(x, series, strict=True)):
        curve = [(x_axis.position(a), y_axis.position(b)) for a, b in zip(xs, one.values, strict=True) if math.isfinite(b)]
        shapes.append(_curve(curve, one.name, _color(number)))
    return _figure(title, left, _grid(y_axis, left) + shapes, x_label, y_label, [one.name for one in series])


def _curve(points: Points, name: str, color: str) -> str:
    tip = f"<title>{escape(name)}</title>"
    if len(points) == 1:
        # A line with one point would be invisible.
        (a, b), *_ = points
        return f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{color}">{tip}</circle>'
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return f'<polyline class="line" stroke="{color}" points="{path}">{tip}</polyline>'


def _figure(title: str, left: float, shapes: list[str], x_label: str, y_label: str, names: Sequence[str]) -> Markup:
    """Return a chart with its legend; one series needs none."""
    labels = [_text((left + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_label, "middle"), _text(2, 13, y_label, "start")]
    key = "".join(f'<span><i style="background:{_color(i)}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    legend = f'<div class="key">{key}</div>' if len(names) > 1 else ""
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(shapes + labels)}</svg>'
    # Every text above is escaped.
    return Markup(f"<figure><h3>{escape(title)}</h3>{legend}{drawing}</figure>")  # noqa: S704


def _grid(y: _Axis, left: float) -> list[str]:
    shapes = []
    for at, label in y.ticks:
        shapes.append(f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        shapes.append(_text(left - 6, at + 4, label, "end"))
    return shapes


def _left_margin(y: _Axis) -> float:
    return max(40.0, 8 + _CHARACTER * max(len(label) for _, label in y.ticks))


def _x_label(x: float, label: str) -> str:
    """Return a label below the axis, within the chart."""
    return _text(min(x, WIDTH - _CHARACTER * len(label) / 2), HEIGHT - _BOTTOM + 17, label, "middle")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _color(number: int) -> str:
    return f"var(--c{number % _COLORS})"


def _scale(low: float, high: float, at_low: float, at_high: float) -> Callable[[float], float]:
    return lambda value: at_low + (value - low) / (high - low) * (at_high - at_low)


def _linear_axis(values: Sequence[float], at_low: float, at_high: float) -> _Axis:
    """Return an axis from `at_low` to `at_high` with round ticks; a constant has one tick, in the middle, with its value."""
    low, high = min(values), max(values)
    if high - low <= _CONSTANT * max(abs(low), abs(high)):
        half = abs(low) or 1.0
        position = _scale(low - half, low + half, at_low, at_high)
        return _Axis([(position(low), f"{low:,.6g}" if abs(low) < 1e6 else f"{low:,.0f}")], position)
    ticks = _ticks(low, high, are_whole=all(float(value).is_integer() for value in values))
    position = _scale(ticks[0], ticks[-1], at_low, at_high)
    return _Axis([(position(tick), label) for tick, label in zip(ticks, _tick_labels(ticks), strict=True)], position)


def _ticks(low: float, high: float, are_whole: bool = False) -> list[float]:
    """Return about five round numbers from at most `low` to at least `high`, without fractions if `are_whole`."""
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    if are_whole:
        step = max(1, math.ceil(step))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the ticks in one unit, with enough digits to distinguish them: 1.5k, 20M."""
    step, largest = ticks[1] - ticks[0], max(map(abs, ticks))
    if largest < 1e-3:
        digits = _num_digits(step, lambda tick, digits: float(f"{tick:.{digits}e}"), ticks)
        return [f"{tick:.{digits}e}" if tick else "0" for tick in ticks]
    for least, factor, unit in _UNITS:
        scaled = [tick / factor for tick in ticks]
        digits = _num_digits(step / factor, round, scaled)
        if largest >= least and digits <= _UNIT_DIGITS:
            return [f"{tick:,.{digits}f}{unit}" if tick else "0" for tick in scaled]
    digits = _num_digits(step, round, ticks)
    return [f"{tick:,.{digits}f}" if tick else "0" for tick in ticks]


def _num_digits(step: float, rounded: Callable[[float, int], float], values: Sequence[float]) -> int:
    """Return the fewest decimal places with which rounding moves no value by more than a hundredth of `step`."""
    return next(
        (digits for digits in range(16) if all(abs(rounded(value, digits) - value) <= step / 100 for value in values)), 16
    )
