"""A metric is one row of launcher.tracking.metrics.METRICS; W&B, `status`, the report and the console line show it."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from launcher import run_store
from launcher.cli.render import terminal
from launcher.cli.report import _read_run_files, page
from launcher.cli.status import status_rows, summarize
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import JsonlTracker
from launcher.tracking.metrics import METRICS, Curve, Metric, Part, StatusPart
from launcher.tracking.tracker import ConsoleTracker
from launcher.tracking.wandb.tracker import Session
from launcher.tracking.wandb.workspace import Target, as_json

NAME = "perf/experts_used_frac"


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = Metric(
        section="Throughput",
        title="Experts in use",
        curve=Curve("Share of experts in use", 100.0, "%"),
        status=StatusPart("{:.0%} in use".format, line="experts"),
        console=Part("experts {:.2f}".format),
        lowest="best/experts_used_frac",
    )
    monkeypatch.setitem(METRICS, NAME, metric)


@pytest.fixture
def run(run: RunDir) -> RunDir:
    """A run that logged the metric at two steps."""
    log = JsonlTracker(run, 1)
    for step, frac in ((1, 0.5), (2, 0.25)):
        log.log(step, {"train/loss": 2.0, NAME: frac})
    log.finish("completed")
    run_store.update_status(run, state="completed", attempt=1, step=2, max_steps=2)
    return run


def test_status_shows_the_metric(run: RunDir) -> None:
    lines = terminal.to_lines(status_rows(summarize(run, run_store.read_status(run))))
    assert "experts     25% in use" in lines


def test_the_report_has_a_chart_of_the_metric(run: RunDir) -> None:
    assert "<h3>Share of experts in use</h3>" in page([_read_run_files(run, "demo")])


def test_the_console_line_ends_with_the_metric() -> None:
    stream = io.StringIO()
    ConsoleTracker(2, stream).log(1, {"train/loss": 2.0, NAME: 0.5})
    assert stream.getvalue() == "step   1/2  loss 2.000  experts 0.50\n"


def test_the_workspace_has_a_panel_of_the_metric() -> None:
    spec = json.loads(as_json(Target("demo")))["spec"]
    sections = {part["name"]: part["panels"] for part in spec["section"]["panelBankConfig"]["sections"]}
    shown = {panel["config"]["chartTitle"]: panel["config"]["metrics"] for panel in sections["Throughput"]}
    assert shown["Experts in use"] == [NAME]


def test_wandb_defines_the_metric_over_the_steps_and_keeps_its_lowest_value(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb_run = MagicMock(offline=True, resumed=False, dir=str(run.root / "wandb/offline-run/files"))
    library = SimpleNamespace(init=lambda **settings: wandb_run, Settings=dict, teardown=lambda **settings: None)
    monkeypatch.setitem(sys.modules, "wandb", library)
    session = Session(run_store.load_plan(run), run, offline=True, on_stop=lambda: None)
    wandb_run.define_metric.assert_any_call(NAME, step_metric="trainer/step")
    session.catch_up(3)
    session.finish("completed")
    wandb_run.summary.update.assert_any_call({"best/experts_used_frac": 0.25, "best/experts_used_frac_step": 2})
