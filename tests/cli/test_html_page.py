"""HTML pages escape all text and load nothing from elsewhere."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from launcher.cli.pages import charts, html_page
from launcher.cli.pages.charts import Series

EVIL = "<script>alert('x')</script>\"&"


class Reader(HTMLParser):
    """Checks that tags are balanced, and collects all text outside the style sheet."""

    VOID = ("meta", "br", "wbr", "rect", "line", "polyline", "circle")

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
    drawn = [
        charts.bars(EVIL, [(EVIL, 1.0, EVIL)]),
        charts.lines(EVIL, [[1, 2], [1, 4]], [Series(EVIL, [1, 2]), Series("s", [0, 3])], EVIL, EVIL),
        charts.lines(EVIL, [[]], [Series(EVIL, [])], EVIL, EVIL),
    ]
    template = html_page.environment().from_string(TEMPLATE)
    return template.render(title=EVIL, subtitle=EVIL, text=EVIL, charts=drawn)


def test_texts_are_escaped_and_tags_are_closed() -> None:
    html = everything()
    reader = read(html)
    assert "script" not in reader.tags
    assert sum(text.count("alert('x')") for text in reader.text) >= 8
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|url\(|@import", html)
    assert "<td>two<br>lines</td>" in html
    assert '<td class="number">7</td>' in html


def test_lines_are_to_scale() -> None:
    html = charts.lines("t", [[1, 2, 3]], [Series("s", [0, 50, 100])], "x", "y")
    (path,) = re.findall(r'points="([^"]+)"', html)
    points = [tuple(map(float, pair.split(","))) for pair in path.split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.3)
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.3)
    assert points[0][1] > points[2][1], "up is more"


def test_values_that_are_not_finite_are_left_out_and_empty_series_draw_nothing() -> None:
    html = charts.lines("t", [[0, 1, 2]], [Series("s", [1.0, math.nan, 3.0])], "x", "y")
    assert len(re.findall(r"[\d.]+,[\d.]+", re.findall(r'points="([^"]+)"', html)[0])) == 2
    assert "nothing to draw" in charts.lines("t", [[]], [Series("s", [])], "x", "y")
    assert "<svg" in charts.lines("t", [[3]], [Series("s", [7])], "x", "y")


@pytest.mark.parametrize(("low", "high"), [(0, 7), (-3.2, 1e9), (0.001, 0.0012), (1e-5, 1.5e-5), (12.7, 12.701)])
def test_ticks_are_few_and_round_and_enclose(low: float, high: float) -> None:
    ticks = charts._ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    assert len(set(charts._tick_labels(ticks))) == len(ticks)


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        ([1, 2], ["1", "2"]),
        ([1, 3], ["1", "2", "3"]),
        ([100_000, 100_004], ["100,000", "100,001", "100,002", "100,003", "100,004"]),
        ([0, 20_000], ["0", "5k", "10k", "15k", "20k"]),
        ([0, 6e6], ["0", "2M", "4M", "6M"]),
        ([0.0, 5e-5], ["0", "2e-05", "4e-05", "6e-05"]),
        ([10.0, 10.5], ["10.0", "10.2", "10.4", "10.6"]),
    ],
)
def test_tick_labels_differ_and_whole_numbers_have_no_fractions(steps: list[float], labels: list[str]) -> None:
    axis = charts._linear_axis(steps, 0, 100)
    assert [label for _, label in axis.ticks] == labels


@pytest.mark.parametrize("values", [[12.7], [12.7, 12.7, 12.7], [12.7, 12.70000001]])
def test_a_constant_has_one_tick_with_its_value(values: list[float]) -> None:
    axis = charts._linear_axis(values, 100, 0)
    assert axis.ticks == [(50, "12.7")]
    assert axis.position(12.7) == 50
