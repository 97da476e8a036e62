"""Pages contain their texts escaped, and load nothing from elsewhere."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from launcher.cli import html_page, svg_charts
from launcher.cli.svg_charts import Series

EVIL = "<script>alert('x')</script>\"&"


class Reader(HTMLParser):
    """Tags that are opened and closed in order, and all text outside of the style sheet."""

    VOID = ("meta", "br", "rect", "line", "polyline", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        if tag not in self.VOID or tag in ("rect", "polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] in ("rect", "polyline", "circle") and tag not in ("rect", "polyline", "circle"):
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


TEMPLATE = """{% extends "page.html.jinja" %}
{% from "components.html.jinja" import cards, marked, side_by_side, table %}
{% block body %}
<p class="bad">{{ text }}</p>
{{ cards([(text, text)]) }}
{{ table([text], [[text], ["two\\nlines"]]) }}
{{ table([], [[text, "7"]], numbers=[1]) }}
{{ marked([(text, True), ("plain", False)]) }}
{{ charts[0] }}
{{ side_by_side(charts[1:]) }}
{% endblock %}
"""


def everything() -> str:
    charts = [
        svg_charts.bars(EVIL, [(EVIL, 1.0, EVIL)]),
        svg_charts.stacked_bars(EVIL, [EVIL, "b"], [Series(EVIL, [1, 2]), Series("s", [0, 3])], EVIL, EVIL),
        svg_charts.lines(EVIL, [[1, 2], [1, 4]], [Series(EVIL, [1, 2]), Series("s", [0, 3])], EVIL, EVIL),
        svg_charts.lines(EVIL, [[]], [Series(EVIL, [])], EVIL, EVIL),
    ]
    template = html_page.environment().from_string(TEMPLATE)
    return template.render(title=EVIL, subtitle=EVIL, text=EVIL, charts=charts)


def test_texts_are_escaped_and_tags_are_closed() -> None:
    html = everything()
    reader = read(html)
    assert "script" not in reader.tags
    assert sum(text.count("alert('x')") for text in reader.text) >= 12
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|url\(|@import", html)
    assert "<td>two<br>lines</td>" in html
    assert '<td class="number">7</td>' in html


def test_stacked_bars_are_to_scale() -> None:
    html = svg_charts.stacked_bars("t", ["a", "b"], [Series("s", [10, 20]), Series("u", [30, 0])], "x", "y")
    boxes = [tuple(map(float, box)) for box in re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', html)]
    (low_top, low), (high_top, high), (_, other) = boxes
    assert high == pytest.approx(3 * low, abs=0.3)
    assert other == pytest.approx(2 * low, abs=0.3)
    assert high_top + high == pytest.approx(low_top, abs=0.2)


def test_lines_are_to_scale() -> None:
    html = svg_charts.lines("t", [[1, 10, 100]], [Series("s", [0, 50, 100])], "x", "y", log_x=True)
    (path,) = re.findall(r'points="([^"]+)"', html)
    points = [tuple(map(float, pair.split(","))) for pair in path.split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.3)
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.3)
    assert points[0][1] > points[2][1], "up is more"


def test_values_that_are_not_finite_are_left_out_and_empty_series_draw_nothing() -> None:
    html = svg_charts.lines("t", [[0, 1, 2]], [Series("s", [1.0, math.nan, 3.0])], "x", "y")
    assert len(re.findall(r"[\d.]+,[\d.]+", re.findall(r'points="([^"]+)"', html)[0])) == 2
    assert "nothing to draw" in svg_charts.lines("t", [[]], [Series("s", [])], "x", "y")
    assert "<svg" in svg_charts.stacked_bars("t", [], [], "x", "y")
    assert "<svg" in svg_charts.lines("t", [[3]], [Series("s", [7])], "x", "y")


@pytest.mark.parametrize(("low", "high"), [(0, 7), (0, 0), (-3.2, 1e9), (0.001, 0.0012), (5, 5)])
def test_ticks_are_few_and_round_and_enclose(low: float, high: float) -> None:
    ticks = svg_charts._ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    assert len({svg_charts._number(tick) for tick in ticks}) == len(ticks)


def test_one_point_is_a_dot() -> None:
    html = svg_charts.lines("t", [[3], [1, 2]], [Series("one", [1.5e-5]), Series("two", [1e-5, 2e-5])], "x", "y")
    assert re.search(r'<circle cx="[\d.]+" cy="[\d.]+" r="4" fill="var\(--c0\)"><title>one</title>', html)
    assert html.count("<polyline") == 1


def test_labels_of_small_numbers_have_room() -> None:
    html = svg_charts.lines("t", [[1, 2]], [Series("rate", [1.25e-5, 2.25e-5])], "x", "y")
    labels = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="end">([^<]*)<', html)
    assert "1.25e-05" in [label for _, label in labels]
    # A digit is about 0.56 of the 15 pixels of a line high wide.
    assert all(float(x) >= 0.56 * 15 * len(label) for x, label in labels)
