"""Trackers and alerts, and the progress of long operations in logs, on a terminal, and in events of a run."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hand_made import event_texts
from plan_fixtures import PlanOf

from launcher.errors import RunError
from launcher.plan.run_dir import RunDir
from launcher.tracking import progress
from launcher.tracking.jsonl import JsonlTracker, read_events, read_metrics
from launcher.tracking.metrics import format_duration, format_step
from launcher.tracking.progress import Pace, ProgressCounter
from launcher.tracking.tracker import REPEAT_S, Composite, ConsoleTracker, RateLimit, start_trackers

FULL = {
    "trainer/step": 12,
    "trainer/eta_s": 100.2,
    "train/loss": 1.8342,
    "train/lr": 1.8e-5,
    "train/grad_norm": 1.318,
    "perf/tokens_per_sec": 231.4,
    "perf/mfu": 0.4,
}
GIB = 2**30


def no_stop() -> None:
    """The Stop button is never pressed."""


class Broken(ConsoleTracker):
    """A console tracker that fails during the run."""

    error: BaseException = ValueError("no such column")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= 2:
            raise self.error
        super().log(step, metrics)

    def finish(self, state: str) -> None:
        raise self.error


def test_a_failing_tracker_is_reported_once_and_removed(run_dir: Path) -> None:
    stream = io.StringIO()
    composite = Composite([Broken(4, stream), JsonlTracker(RunDir(run_dir), attempt=1)])
    for step in (1, 2, 3):
        composite.log(step, {"train/loss": float(step)})
    composite.finish("completed")
    assert stream.getvalue().count("\n") == 1
    assert [line["trainer/step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3]
    alerts = event_texts(RunDir(run_dir))
    assert alerts == ["Broken failed and is off for the rest of the run; training continues. ValueError: no such column"]


def test_no_line_is_lost_while_storage_fails(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    composite = Composite([ConsoleTracker(9, stream), JsonlTracker(RunDir(run_dir), attempt=1)])
    composite.log(1, {"train/loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        for step in (2, 3):
            composite.log(step, {"train/loss": float(step)})
        composite.event("info", "at step 3", 3)
    composite.log(4, {"train/loss": 4.0})
    composite.finish("completed")
    raw = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["trainer/step"] for line in raw] == [1, 2, 3, 4]
    kinds = [event["kind"] for event in read_events(run_dir / "events.jsonl")]
    assert kinds == ["alert", "info", "end"]
    (line,) = [line for line in stream.getvalue().splitlines() if "JsonlTracker failed" in line]
    assert re.match(
        rf"alert: the disk of {run_dir} is full \(.* free\): JsonlTracker failed and is retried with the next data", line
    )


def full_disk(descriptor: int, data: bytes) -> int:
    """Write half a line. On Linux pwrite appends here too, because the file is opened for appending."""
    os.pwrite(descriptor, data[: len(data) // 2], 0)
    return len(data) // 2


def test_a_failure_to_close_reaches_the_trackers_started_before(run_dir: Path) -> None:
    composite = Composite([JsonlTracker(RunDir(run_dir), attempt=1), Broken(4, io.StringIO())])
    composite.finish("completed")
    kinds = [event["kind"] for event in read_events(run_dir / "events.jsonl")]
    assert kinds == ["alert", "end"]


def test_the_failure_of_the_last_tracker_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    composite = Composite([Broken(4, io.StringIO()), Broken(4, io.StringIO())])
    with caplog.at_level(logging.WARNING):
        composite.log(2, {"train/loss": 1.0})
        composite.log(3, {"train/loss": 1.0})
    assert len(caplog.records) == 2


def test_alerts_of_one_kind_are_rate_limited(run_dir: Path) -> None:
    composite = Composite([JsonlTracker(RunDir(run_dir), attempt=1)])
    for step in (1, 2):
        composite.event("alert", f"the loss jumped: to {step}", step)
        composite.event("alert", f"storage is slow: {step} s", step)
        composite.event("info", "the loss jumped: to nowhere", step)
    composite.finish("completed")
    told = [(event["kind"], event["step"]) for event in read_events(run_dir / "events.jsonl")]
    assert told == [("alert", 1), ("alert", 1), ("info", 1), ("info", 2), ("end", None)]


def test_without_wandb_files_and_console_lines_are_written(
    make_plan: PlanOf, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composite = start_trackers(make_plan(kind="none"), run_dir, attempt=1, on_stop=no_stop)
    composite.log(1, {"train/loss": 2.0})
    composite.finish("completed")
    assert capsys.readouterr().out.splitlines() == ["step   1/40  loss 2.000"]
    assert not (run_dir / "wandb").exists()


def test_a_folder_that_cannot_be_written_fails_the_start(make_plan: PlanOf, run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written"):
        start_trackers(make_plan(), run_dir, attempt=1, on_stop=no_stop)


def test_settings_that_wandb_rejects_are_an_alert_and_training_continues(make_plan: PlanOf, run_dir: Path) -> None:
    plan = make_plan()
    # Validation of settings rejects tags that are known to be too long; W&B may reject more.
    tracking = plan.config.tracking.model_copy(update={"tags": ("x" * 100,)})
    plan = plan.model_copy(update={"config": plan.config.model_copy(update={"tracking": tracking})})
    composite = start_trackers(plan, run_dir, attempt=1, on_stop=no_stop)
    composite.log(1, {"train/loss": 2.0})
    composite.finish("completed")
    (alert,) = event_texts(RunDir(run_dir))
    assert alert.startswith(
        "this attempt is not tracked in W&B, only in metrics.jsonl: Weights & Biases cannot start: ValidationError"
    )
    texts = [event["text"] for event in read_events(run_dir / "events.jsonl")]
    assert any(text.endswith("; metrics.jsonl has all data") for text in texts)


def test_the_rate_limit_admits_an_alert_again_after_its_interval() -> None:
    now = [0.0]
    limit = RateLimit(lambda: now[0])
    assert limit.admit("the loss jumped: it is 4")
    assert limit.admit("training has become slow: 7 tokens/s"), "another kind"
    now[0] = REPEAT_S - 1
    assert not limit.admit("the loss jumped: it is 5")
    now[0] = REPEAT_S
    assert limit.admit("the loss jumped: it is 6")
    assert not limit.admit("the loss jumped: it is 7")


def test_a_full_step_is_one_line() -> None:
    assert format_step(FULL, 40) == "step  12/40  loss 1.834  lr 1.8e-05  grad 1.32  231 tok/s  eta 1m40s"


@pytest.mark.parametrize(
    "metrics, max_steps, line",
    [
        ({"trainer/step": 3, "train/loss": 2.0}, 40, "step   3/40  loss 2.000"),
        ({"trainer/step": 3, "train/loss": 2.0}, 120000, "step      3/120000  loss 2.000"),
        ({"trainer/step": 3, "train/loss": 2.0}, None, "step   3  loss 2.000"),
        ({"train/loss": float("nan"), "trainer/eta_s": float("inf")}, 40, "loss nan  eta ?"),
        ({"perf/tokens_per_sec": 1234567.8}, 40, "1,234,568 tok/s"),
        ({}, 40, ""),
    ],
)
def test_missing_metrics_are_left_out(metrics: dict[str, float], max_steps: int | None, line: str) -> None:
    assert format_step(metrics, max_steps) == line


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (59.6, "1m00s"), (100, "1m40s"), (7500, "2h05m"), (3600, "1h00m"), (273600, "3d04h")]
)
def test_durations_show_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_steps_and_events_are_lines_and_evaluations_are_only_events() -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(40, stream)
    tracker.log(3, {"train/loss": 2.0})
    tracker.log(3, {"eval/held_out/loss": 1.5})
    tracker.event("eval", "held-out loss 1.500", 3, loss=1.5)
    tracker.event("info", "checkpoint written")
    tracker.finish("completed")
    assert stream.getvalue().splitlines() == [
        "step   3/40  loss 2.000",
        "eval at step 3: held-out loss 1.500",
        "info: checkpoint written",
    ]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_at_growing_intervals_and_not_for_short_work() -> None:
    clock, lines = Clock(), []
    counter = ProgressCounter("loading", 3600 * GIB, lines.append, Pace(clock))
    written_at = []
    for _ in range(3600):
        clock.now += 1
        counter.advance(GIB)
        if len(lines) > len(written_at):
            written_at.append(clock.now - 100)
    assert written_at[:5] == [5, 10, 15, 20, 27]
    assert 20 <= len(lines) <= 35
    assert max(b - a for a, b in itertools.pairwise(written_at)) <= 300
    assert lines[0] == "loading: 5.00 GiB of 3,600.00 GiB (0%), 59m55s left"
    assert lines[3] == "loading: 20.00 GiB of 3,600.00 GiB (1%), 59m40s left"


def test_counted_items_are_shown_with_the_time_left() -> None:
    clock, lines = Clock(), []
    counter = ProgressCounter("evaluating", 30, lines.append, Pace(clock), show=str)
    for _ in range(30):
        clock.now += 1
        counter.advance(1)
    assert lines[1] == "evaluating: 10 of 30 (33%), 20s left"


@pytest.mark.parametrize(
    ("done", "total", "elapsed_s", "text"),
    [
        (GIB, 4 * GIB, 10, "x: 1.00 GiB of 4.00 GiB (25%), 30s left"),
        (0, 4 * GIB, 10, "x: 0 bytes of 4.00 GiB (0%)"),
        (5 * GIB, 4 * GIB, 10, "x: 4.00 GiB of 4.00 GiB (100%)"),
        (3 * GIB, 0, 10, "x: 3.00 GiB"),
    ],
)
def test_the_text(done: int, total: int, elapsed_s: float, text: str) -> None:
    clock = Clock()
    counter = ProgressCounter("x", total, [].append, Pace(clock))
    clock.now += elapsed_s
    counter._done = done
    assert counter.describe() == text


@pytest.mark.parametrize(("done", "total", "is_known"), [(1, 20_000, False), (10, 20_000, True), (1, 4, True)])
def test_the_first_of_many_items_do_not_predict_the_rest(done: int, total: int, is_known: bool) -> None:
    assert bool(progress.time_left(done, total, 10)) == is_known


def test_documents_have_a_time_left_that_counts_what_was_done_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "Pace", lambda: Pace(clock))
    with progress.show_documents("rows") as show:
        show("pass 1 of 2", 50, 100)
        clock.now += 10
        show("pass 1 of 2", 60, 100)
        clock.now += 40
        show("pass 1 of 2", 100, 100)
    assert capsys.readouterr().err == "pass 1 of 2: 60 of 100 rows, 40s left\npass 1 of 2: 100 of 100 rows\n"


def test_something_that_does_not_tell_how_far_it_is_is_seen_to_work() -> None:
    said = threading.Event()
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        said.set()

    with progress.report_elapsed_time("pushing 3 GiB", say, progress.Pace(first_s=0.0, longest_s=0.1)):
        assert said.wait(60)
    num_lines = len(lines)
    time.sleep(0.3)
    assert lines[0] == "pushing 3 GiB: 0s so far"
    assert len(lines) == num_lines, "nothing is said after the end"


def test_a_terminal_gets_one_live_line_that_disappears() -> None:
    code = (
        "from launcher.tracking.progress import show_progress\nimport time\n"
        "with show_progress() as make:\n    advance = make('exporting', 100)\n"
        "    for _ in range(4):\n        advance(25); time.sleep(0.3)\nprint('done')"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment())
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:
        pass  # a terminal that closes raises this
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    assert b"exporting: 50 bytes of 100 bytes (50%)" in shown
    last = shown.split(b"\x1b[2K")[-1]
    assert b"done" in last, "the live line was erased"
    assert b"exporting" not in last


def test_a_log_gets_no_escape_sequences() -> None:
    code = (
        "from functools import partial\nfrom launcher.tracking import progress\n"
        "progress.Pace = partial(progress.Pace, longest_s=0.0)\n"
        "with progress.show_progress() as make:\n    advance = make('exporting', 100)\n    advance(25)\n    advance(75)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stderr == "exporting: 25 bytes of 100 bytes (25%)\nexporting: 100 bytes of 100 bytes (100%)\n"


def environment() -> dict[str, str]:
    return {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
