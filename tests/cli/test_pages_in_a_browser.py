"""The HTML pages of `report` and `data` as rendered by a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hand_made import made_verdict
from missing_program import Box, Shown, show

from launcher.plan.run_dir import RunDir

Launch = Callable[..., subprocess.CompletedProcess[str]]


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
    assert done.returncode == 0, done.stderr
    assert_drawn(show(run.root / "report.html", tmp_path), num_charts=5)


@pytest.mark.browser
@pytest.mark.rest
def test_two_runs_are_drawn_over_each_other(launch_here: Launch, run: RunDir, tmp_path: Path) -> None:
    """The runs have the same steps, and their losses differ by 0.5."""
    other = RunDir(run.root.with_name("other"))
    shutil.copytree(run.root, other.root)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    other.metrics.write_text("".join(json.dumps(line | {"train/loss": line["train/loss"] + 0.5}) + "\n" for line in lines))
    page = tmp_path / "both.html"
    done = launch_here("report", "demo", "other", "--root", str(run.root.parent), "--html", str(page))
    assert done.returncode == 0, done.stderr
    shown = show(page, tmp_path)
    assert_drawn(shown, num_charts=8)
    losses, rates = ([mark for mark in chart.marks if mark[2] - mark[0] > 100] for chart in shown.charts[:2])
    assert len(losses) == len(rates) == 2, "a line for each run"
    (left, top, right, bottom), (_, other_top, _, other_bottom) = losses
    assert (losses[1][0], losses[1][2]) == (left, right), "over the same steps"
    assert other_top < top - 20
    assert other_bottom < bottom - 20
    assert rates[0] == rates[1]


@pytest.mark.browser
@pytest.mark.rest
def test_the_charts_of_the_data_page_are_visible(launch_here: Launch, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}. " * (1 + n % 7)} for n in range(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "data.html"
    done = launch_here("data", "model=tiny", f"data.sources=[{{path: {tmp_path}/train.jsonl}}]", "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert_drawn(show(page, tmp_path), num_charts=2)
