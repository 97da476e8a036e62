from __future__ import annotations

import json
import math
import time
from pathlib import Path

from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import SUPERSEDED, JsonlTracker, Tail, append_event, read_events, read_metrics


def test_a_line_per_step_is_on_disk_at_once(run_dir: Path) -> None:
    run = RunDir(run_dir)
    tracker = JsonlTracker(run, attempt=1)
    tracker.log(1, {"trainer/step": 1.0, "train/loss": 2.5, "trainer/tokens": 2048})
    line = json.loads(run.metrics.read_text())
    assert abs(line.pop("time") - time.time()) < 60
    assert line == {"trainer/step": 1, "attempt": 1, "train/loss": 2.5, "trainer/tokens": 2048}
    assert isinstance(line["trainer/step"], int)


def test_nan_and_infinity_survive_in_a_valid_json_file(run_dir: Path) -> None:
    run = RunDir(run_dir)
    JsonlTracker(run, attempt=1).log(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/lr": 0.1})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    raw = json.loads(run.metrics.read_text(), parse_constant=refuse)
    assert raw["train/loss"] is None
    assert raw["nonfinite"] == {"train/loss": "nan", "train/grad_norm": "inf"}
    (line,) = read_metrics(run.metrics)
    assert math.isnan(line["train/loss"])
    assert line["train/grad_norm"] == math.inf
    assert "nonfinite" not in line


def test_a_superseded_attempt_records_no_end(run_dir: Path) -> None:
    run = RunDir(run_dir)
    for attempt, state in ((1, SUPERSEDED), (2, "completed")):
        JsonlTracker(run, attempt).finish(state)
    assert [(event["attempt"], event["text"]) for event in read_events(run.events)] == [(2, "attempt 2 ended: completed")]


def test_read_metrics_merges_lines_of_steps_that_the_newest_attempt_continues(run_dir: Path) -> None:
    run = RunDir(run_dir)
    first = JsonlTracker(run, attempt=1)
    for step in (1, 2, 3, 4):
        first.log(step, {"train/loss": 10.0 + step})
    first.log(3, {"eval/held_out/loss": 7.0})
    second = JsonlTracker(run, attempt=2)
    second.log(3, {"train/loss": 23.0})
    second.log(3, {"data/label_frac": 0.5})
    lines = read_metrics(run.metrics)
    assert [(line["trainer/step"], line["attempt"], line["train/loss"]) for line in lines] == [
        (1, 1, 11.0),
        (2, 1, 12.0),
        (3, 2, 23.0),
    ]
    assert lines[2]["data/label_frac"] == 0.5
    # A save or an evaluation afterwards does not move the end of the step.
    assert lines[2]["time"] == next(line["time"] for line in Tail(run.metrics).poll() if line.get("train/loss") == 23.0)
    assert "eval/held_out/loss" not in lines[2]
    # An abandoned attempt that still runs has no effect.
    first.log(5, {"train/loss": 15.0})
    second.log(4, {"train/loss": 24.0})
    assert [line["train/loss"] for line in read_metrics(run.metrics)] == [11.0, 12.0, 23.0, 24.0]


def test_an_attempt_that_begins_with_an_evaluation_continues_from_that_step(run_dir: Path) -> None:
    run = RunDir(run_dir)
    first, second = JsonlTracker(run, attempt=1), JsonlTracker(run, attempt=2)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": 10.0 + step})
    second.log(2, {"eval/held_out/loss": 7.0})
    lines = read_metrics(run.metrics)
    assert [(line["trainer/step"], line["train/loss"], line.get("eval/held_out/loss")) for line in lines] == [
        (1, 11.0, None),
        (2, 12.0, 7.0),
    ]
    second.log(3, {"train/loss": 23.0})
    assert [line["train/loss"] for line in read_metrics(run.metrics)] == [11.0, 12.0, 23.0]
    # A save is logged at the step that is being trained.
    third = JsonlTracker(run, attempt=3)
    third.log(3, {"ckpt/stall_s": 0.5})
    third.log(3, {"train/loss": 33.0})
    assert [(line["train/loss"], line["attempt"]) for line in read_metrics(run.metrics)] == [(11.0, 1), (12.0, 2), (33.0, 3)]


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_attempt(run_dir: Path) -> None:
    run = RunDir(run_dir)
    JsonlTracker(run, attempt=1).log(1, {"train/loss": 2.0})
    with open(run.metrics, "a") as file:
        file.write('{"trainer/step": 2, "train/lo')
    assert [line["trainer/step"] for line in read_metrics(run.metrics)] == [1]
    JsonlTracker(run, attempt=2).log(2, {"train/loss": 1.0})
    assert [json.loads(line)["trainer/step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def test_torn_lines_and_other_values_than_objects_are_left_out(run_dir: Path) -> None:
    run = RunDir(run_dir)
    run.metrics.write_text('7\nnull\n[]\n{"trainer/step": 2, "attempt": 1}\n')
    assert [line["trainer/step"] for line in read_metrics(run.metrics)] == [2]


def test_events_keep_their_fields_and_order(run_dir: Path) -> None:
    run = RunDir(run_dir)
    tracker = JsonlTracker(run, attempt=3)
    tracker.event("sample", 'says "hi"\nand more', 4, prompt="q", folder=Path("/x"), scores=[1.0, float("nan")])
    tracker.summary({"train/loss": 1.5})
    tracker.finish("completed")
    events = read_events(run.events)
    assert [event["kind"] for event in events] == ["sample", "summary", "end"]
    assert events[0] | {"time": 0} == {
        "time": 0,
        "attempt": 3,
        "step": 4,
        "kind": "sample",
        "text": 'says "hi"\nand more',
        "fields": {"prompt": "q", "folder": "/x", "scores": [1.0, "nan"]},
    }
    assert events[1]["fields"] == {"train/loss": 1.5}
    assert events[2]["fields"] == {"state": "completed"}


def test_tail_returns_each_complete_line_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.poll() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert tail.poll() == [{"a": 1}, {"a": 2}]
    assert tail.poll() == []
    with open(path, "a") as file:
        file.write(': 3}\n{"a": 4}\n')
    assert tail.poll() == [{"a": 3}, {"a": 4}]


def test_an_event_recorded_by_another_process_is_not_written_again(run_dir: Path) -> None:
    run = RunDir(run_dir)
    append_event(run, 1, "alert", "Xid 79 on GPU 3")
    JsonlTracker(run, attempt=1).event("alert", "Xid 79 on GPU 3 of n1", 7, recorded=True)
    assert [event["text"] for event in read_events(run.events)] == ["Xid 79 on GPU 3"]


def test_an_event_after_a_line_that_a_full_disk_tore_is_read(run_dir: Path) -> None:
    run = RunDir(run_dir)
    append_event(run, 1, "info", "whole")
    with open(run.events, "a") as file:
        file.write('{"time": 1.0, "attempt": 1, "kind": "alert", "text": "to')
    append_event(run, 1, "alert", "the attempt failed")
    append_event(run, 1, "info", "after it")
    assert [event["text"] for event in read_events(run.events)] == ["whole", "the attempt failed", "after it"]
