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
        charts.stacked_bars(EVIL, [EVIL, "b"], [Series(EVIL, [1, 2]), Series("s", [0, 3])], EVIL, EVIL),
        charts.lines(EVIL, [[1, 2], [1, 4]], [Series(EVIL, [1, 2]), Series("s", [0, 3])], EVIL, EVIL),
        charts.lines(EVIL, [[]], [Series(EVIL, [])], EVIL, EVIL),
    ]
    template = html_page.environment().from_string(TEMPLATE)
    return template.render(title=EVIL, subtitle=EVIL, text=EVIL, charts=drawn)


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
    html = charts.stacked_bars("t", ["a", "b"], [Series("s", [10, 20]), Series("u", [30, 0])], "x", "y")
    boxes = [tuple(map(float, box)) for box in re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', html)]
    (low_top, low), (high_top, high), (_, other) = boxes
    assert high == pytest.approx(3 * low, abs=0.3)
    assert other == pytest.approx(2 * low, abs=0.3)
    assert high_top + high == pytest.approx(low_top, abs=0.2)


def test_lines_are_to_scale() -> None:
    html = charts.lines("t", [[1, 10, 100]], [Series("s", [0, 50, 100])], "x", "y", log_x=True)
    (path,) = re.findall(r'points="([^"]+)"', html)
    points = [tuple(map(float, pair.split(","))) for pair in path.split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.3)
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.3)
    assert points[0][1] > points[2][1], "up is more"


def test_values_that_are_not_finite_are_left_out_and_empty_series_draw_nothing() -> None:
    html = charts.lines("t", [[0, 1, 2]], [Series("s", [1.0, math.nan, 3.0])], "x", "y")
    assert len(re.findall(r"[\d.]+,[\d.]+", re.findall(r'points="([^"]+)"', html)[0])) == 2
    assert "nothing to draw" in charts.lines("t", [[]], [Series("s", [])], "x", "y")
    assert "<svg" in charts.stacked_bars("t", [], [], "x", "y")
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


def test_curves_that_coincide_are_drawn_in_alternating_dashes() -> None:
    """Two runs with the same settings have such curves."""
    x, falling = [[1, 2, 3, 4]] * 3, [4.0, 3.0, 2.0, 1.0]
    html = charts.lines("t", x, [Series("a", falling), Series("b", falling), Series("c", falling[::-1])], "x", "y")
    dashes = dict(re.findall(r'<polyline class="line" stroke="var\(--(c\d)\)"( stroke-dasharray="[^"]*")?', html))
    assert dashes["c0"] == dashes["c2"] == ""
    assert dashes["c1"] == ' stroke-dasharray="14 14"'
    # One run has more steps of the same curve.
    html = charts.lines("t", [[1, 2, 3, 4], [1, 2]], [Series("a", falling), Series("b", falling[:2])], "x", "y")
    assert html.count("stroke-dasharray") == 1
    html = charts.lines("t", [[3], [3]], [Series("a", [1.0]), Series("b", [1.0])], "x", "y")
    assert re.findall(r' r="(\d+)"', html) == ["7", "4"], "a ring around the point"


def test_long_words_of_tables_may_break_behind_punctuation() -> None:
    assert html_page._cell("stdlib_docs") == "stdlib_docs"
    assert html_page._cell("in /scratch/a&b/runs/x") == "in /<wbr>scratch/<wbr>a&amp;<wbr>b/<wbr>runs/<wbr>x"


def test_bars_are_to_scale_and_keep_their_text() -> None:
    html = charts.bars("t", [("a", 0.5, "50.0% (1 of 2)"), ("b", 0.25, "25.0% (10 of 40)")])
    assert re.findall(r"width:([\d.]+)%", html) == ["100.00", "50.00"]
    assert "50.0% (1 of 2)" in html


def test_one_point_is_a_dot() -> None:
    html = charts.lines("t", [[3], [1, 2]], [Series("one", [1.5e-5]), Series("two", [1e-5, 2e-5])], "x", "y")
    assert re.search(r'<circle cx="[\d.]+" cy="[\d.]+" r="4" fill="var\(--c0\)"><title>one</title>', html)
    assert html.count("<polyline") == 1


def test_labels_of_small_numbers_have_room() -> None:
    html = charts.lines("t", [[1, 2]], [Series("rate", [1.25e-5, 2.25e-5])], "x", "y")
    labels = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="end">([^<]*)<', html)
    assert "1.25e-05" in [label for _, label in labels]
    # At a line height of 13 pixels, a digit is about 0.56 x 13 pixels wide.
    assert all(float(x) >= 0.56 * 13 * len(label) for x, label in labels)
