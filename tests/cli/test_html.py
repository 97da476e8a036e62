"""HTML pages escape all text and load nothing from elsewhere; pages of `report` and `data` as rendered by a browser."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from forked import Launch, require_exit
from hand_made import made_verdict
from missing_program import Box, Shown, show

from launcher.cli.render import html
from launcher.cli.render.sections import BarChart, Cards, ChartCurve, Charts, LineChart, MarkedText, Rows, Section, Table, Text
from launcher.plan.run_dir import RunDir

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
    return html.draw(LineChart("t", [ChartCurve("s", x, y)], "x", "y"))


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


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        ([1, 2], ["1", "2"]),
        ([1, 3], ["1", "2", "3"]),
        ([100_000, 100_004], ["100k", "100,001", "100,002", "100,003", "100,004"]),
        ([0, 20_000], ["0", "5k", "10k", "15k", "20k"]),
        ([0, 6e6], ["0", "2M", "4M", "6M"]),
        ([0.0, 5e-5], ["0", "2e-05", "4e-05", "6e-05"]),
        ([10.0, 10.5], ["10", "10.2", "10.4", "10.6"]),
    ],
)
def test_tick_labels_differ_and_whole_numbers_have_no_fractions(steps: list[float], labels: list[str]) -> None:
    axis = html._make_axis(steps, 0, 100)
    assert [label for _, label in axis.ticks] == labels


def inside(inner: Box, outer: Box) -> bool:
    """Whether a box lies inside another, with a tolerance of two pixels for line widths."""
    return inner[0] >= outer[0] - 2 and inner[1] >= outer[1] - 2 and inner[2] <= outer[2] + 2 and inner[3] <= outer[3] + 2


def assert_drawn(shown: Shown, num_charts: int) -> None:
    assert shown.console == ()
    assert shown.wider_by <= 0, "nothing hangs over the side of the window"
    assert len(shown.charts) >= num_charts
    for chart in shown.charts:
        assert chart.box[2] - chart.box[0] > 200
        large = [mark for mark in chart.marks if max(mark[2] - mark[0], mark[3] - mark[1]) > 4]
        assert large, "a chart without anything to see"
        assert all(inside(part, chart.box) for part in (*chart.marks, *chart.texts))


@pytest.mark.browser
@pytest.mark.rest
def test_the_charts_of_the_report_are_visible(launch_here: Launch, run: RunDir, tmp_path: Path) -> None:
    folder = run.root / "evaluations/step-00000010"
    folder.mkdir(parents=True)
    made_verdict().write(folder)
    done = launch_here("report", str(run.root))
    require_exit(done)
    assert_drawn(show(run.root / "report.html", tmp_path), num_charts=5)


@pytest.mark.browser
@pytest.mark.rest
def test_the_charts_of_the_data_page_are_visible(launch_here: Launch, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}. " * (1 + n % 7)} for n in range(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "data.html"
    done = launch_here("data", "model=tiny", f"data.sources=[{{path: {tmp_path}/train.jsonl}}]", "--html", str(page))
    require_exit(done)
    assert_drawn(show(page, tmp_path), num_charts=2)
