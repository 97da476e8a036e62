"""HTML pages escape all text and load nothing from elsewhere."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from launcher.cli.render import charts, html
from launcher.cli.render.sections import BarChart, Cards, ChartCurve, Charts, LineChart, MarkedText, Rows, Section, Table, Text

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


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def everything() -> str:
    drawn = [
        BarChart(EVIL, [(EVIL, 1.0, EVIL)]),
        LineChart(EVIL, [ChartCurve(EVIL, [1, 2], [1, 2]), ChartCurve("s", [1, 4], [0, 3])], EVIL, EVIL),
        LineChart(EVIL, [ChartCurve(EVIL, [], [])], EVIL, EVIL),
    ]
    parts = [
        Text(EVIL, "bad"),
        Cards([(EVIL, EVIL)]),
        Table([EVIL], [[EVIL], ["two\nlines"]]),
        Table(["", ""], [[EVIL, "7"]], numbers=[1]),
        Rows([(EVIL, EVIL)]),
        MarkedText([(EVIL, True), ("plain", False)]),
        Charts(drawn),
    ]
    return html.to_page(EVIL, EVIL, [Section(EVIL, [Section(EVIL, parts, is_folded=True)])])


def curve_of(x: list[float], y: list[float]) -> str:
    return charts.draw(LineChart("t", [ChartCurve("s", x, y)], "x", "y"))


def test_texts_are_escaped_and_tags_are_closed() -> None:
    page = everything()
    reader = read(page)
    assert "script" not in reader.tags
    assert sum(text.count("alert('x')") for text in reader.text) >= 8
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|url\(|@import", page)
    assert "<td>two<br>lines</td>" in page
    assert '<td class="number">7</td>' in page


def test_lines_are_to_scale() -> None:
    (path,) = re.findall(r'points="([^"]+)"', curve_of([1, 2, 3], [0, 50, 100]))
    points = [tuple(map(float, pair.split(","))) for pair in path.split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.3)
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.3)
    assert points[0][1] > points[2][1], "up is more"


def test_values_that_are_not_finite_are_left_out_and_empty_series_draw_nothing() -> None:
    drawn = curve_of([0, 1, 2], [1.0, math.nan, 3.0])
    assert len(re.findall(r"[\d.]+,[\d.]+", re.findall(r'points="([^"]+)"', drawn)[0])) == 2
    assert "nothing to draw" in curve_of([], [])
    assert "<svg" in curve_of([3], [7])


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
