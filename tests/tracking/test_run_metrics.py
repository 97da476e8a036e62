"""A run's files of metrics and events, its main numbers, overfitting, and the loss on general text."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from launcher.evaluate.verdict import describe_general_loss
from launcher.plan.run_dir import RunDir
from launcher.tracking import goodput
from launcher.tracking.goodput import JOINED, LOADED, PHASE, AttemptTimes
from launcher.tracking.jsonl import SUPERSEDED, JsonlTracker, Tail, append_event, read_events, read_metrics
from launcher.tracking.run_metrics import MetricsTail, read_general_loss, read_overfitting, read_tail, read_time_lines


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


def test_a_run_without_metrics_has_an_empty_tail(tmp_path: Path) -> None:
    nothing = MetricsTail((), (), None, None)
    assert read_tail(tmp_path / "metrics.jsonl") == nothing
    (tmp_path / "metrics.jsonl").touch()
    assert read_tail(tmp_path / "metrics.jsonl") == nothing


def test_the_tail_has_the_newest_step_and_evaluation(tmp_path: Path) -> None:
    log = JsonlTracker(RunDir(tmp_path), attempt=1)
    log.log(0, {"eval/held_out/loss": 9.0})
    for step in range(1, 8):
        log.log(step, {"train/loss": 8.0 - step})
    log.log(7, {"eval/held_out/loss": 1.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"trainer/step": 8, "time": 1, "attempt": 1, "train/loss": 0.')
    seen = read_tail(tmp_path / "metrics.jsonl")
    assert (seen.last["trainer/step"], seen.last["train/loss"], seen.eval_loss) == (7, 1.0, 1.5)
    assert seen.losses == (7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
    assert [line["trainer/step"] for line in seen.recent] == [7, 6, 5, 4, 3, 2, 1]
    JsonlTracker(RunDir(tmp_path), attempt=2).log(6, {"train/loss": 2.0})
    assert [line["trainer/step"] for line in read_tail(tmp_path / "metrics.jsonl").recent] == [6], (
        "another attempt's pace is another"
    )


def test_an_evaluation_beyond_the_step_that_a_run_went_back_to_is_not_shown(tmp_path: Path) -> None:
    first, second = (JsonlTracker(RunDir(tmp_path), attempt=attempt) for attempt in (1, 2))
    first.log(5, {"eval/held_out/loss": 2.5})
    first.log(8, {"train/loss": 1.0})
    first.log(8, {"eval/held_out/loss": 77.0})
    second.log(6, {"train/loss": 2.0})
    seen = read_tail(tmp_path / "metrics.jsonl", resumed={2: 5})
    assert (seen.eval_loss, seen.eval_step) == (2.5, 5)


def test_losses_are_sampled_from_the_whole_run(tmp_path: Path) -> None:
    num_points = 7
    log = JsonlTracker(RunDir(tmp_path), attempt=1)
    for step in range(1, 2001):
        log.log(step, {"train/loss": float(step), "train/lr": 1e-5})
    losses = read_tail(tmp_path / "metrics.jsonl", num_points).losses
    assert len(losses) == num_points
    assert losses[0] == 1.0
    assert list(losses) == sorted(losses)
    assert losses[-1] > 2000 * (1 - 2 / num_points)


def test_the_time_lines_give_the_same_breakdown_as_all_lines(tmp_path: Path) -> None:
    """The first attempt has two starts, each later one has one; the last trains nothing, and the file ends in a torn line."""
    file, at = tmp_path / "metrics.jsonl", 1000.0
    lines, events, attempts = [], [], []
    for attempt, first, steps in ((1, 0, 30), (1, 25, 40), (2, 60, 50), (3, 110, 0)):
        if not attempts or attempts[-1].number < attempt:
            attempts.append(AttemptTimes(attempt, at, at + 3, None, 2))
        told = {"attempt": attempt, "step": first}
        events.append({"time": at + 5, **told, "fields": {PHASE: JOINED, "ranks": 2}})
        events.append({"time": at + 9, **told, "fields": {PHASE: LOADED}})
        at += 9
        for step in range(first + 1, first + steps + 1):
            at += 1 + step % 3
            lines.append({"trainer/step": step, "time": at, "attempt": attempt, "train/loss": 1.0})
            if step % 10 == 0:
                at += 2
                lines.append({"trainer/step": step, "time": at, "attempt": attempt, "time/eval_s": 1.5})
                lines.append({"trainer/step": step, "time": at, "attempt": attempt, "ckpt/stall_s": 0.25})
        at += 20
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"train/loss": 0.')
    few = read_time_lines(file, [event["time"] for event in events if event["fields"][PHASE] == JOINED])
    assert len(few) < len(lines) / 3
    found = goodput.break_down(few, events, attempts, at)
    assert found == goodput.break_down(Tail(file).poll(), events, attempts, at)
    assert found.lost_steps == 5 + 5
    assert min(found.replay_s, found.restart_s, found.save_s, found.eval_s) > 0
    assert read_time_lines(tmp_path / "none.jsonl", [1.0]) == []


def test_a_step_logged_after_the_end_of_an_attempt_hides_no_earlier_step(tmp_path: Path) -> None:
    """The clock of the node that records the end may be slow."""
    file = tmp_path / "metrics.jsonl"
    lines = [{"trainer/step": n, "time": 10.0 + n, "attempt": 1, "train/loss": 1.0} for n in (*range(1, 91), 93)]
    events = [
        {"time": 5.0, "attempt": 1, "step": 0, "fields": {PHASE: JOINED, "ranks": 2}},
        {"time": 10.0, "attempt": 1, "step": 0, "fields": {PHASE: LOADED}},
        {"time": 120.0, "attempt": 2, "step": 90, "fields": {PHASE: JOINED, "ranks": 2}},
    ]
    attempts = [AttemptTimes(1, 0.0, 0.0, 101.0, 2), AttemptTimes(2, 102.0, 102.0, None, 2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = goodput.break_down(read_time_lines(file, [5.0, 120.0, 0.0, 101.0, 102.0]), events, attempts, 130.0)
    assert found == goodput.break_down(lines, events, attempts, 130.0)
    assert found.kept_s == 90


def trained(folder: Path, losses: list[tuple[float, float | None]]) -> RunDir:
    """A run with these training and held-out losses after each step; ten steps are an epoch."""
    run = RunDir(folder)
    log = JsonlTracker(run, 1)
    for step, (train, held_out) in enumerate(losses, 1):
        log.log(step, {"train/loss": train, "trainer/epoch": step / 10})
        if held_out is not None:
            log.log(step, {"eval/held_out/loss": held_out})
    return run


def test_a_held_out_loss_that_rises_while_the_training_loss_falls_is_overfitting(tmp_path: Path) -> None:
    run = trained(tmp_path, [(2.0, None), (1.9, 2.0), (1.5, None), (1.4, 1.8), (1.0, None), (0.8, 1.9), (0.6, None), (0.4, 2.2)])
    found = read_overfitting(run)
    assert found is not None
    assert (found.step, found.epoch, found.lowest, found.last) == (4, 0.4, 1.8, 2.2)
    assert (found.train_at_lowest, found.train_at_last) == (pytest.approx(1.45), pytest.approx(0.5))
    assert found.gap == pytest.approx(1.7)
    assert found.summary.startswith("overfitting since step 4 (epoch 0.4): the held-out loss rose from 1.8000 to 2.2000")


@pytest.mark.parametrize(
    "losses",
    [
        # In order: still learning; both losses rise, as after a spike; a rise within the noise; one evaluation; no evaluation.
        [(2.0, 2.0), (1.5, 1.8), (1.0, 1.7)],
        [(2.0, 2.0), (1.5, 1.8), (1.9, 2.2)],
        [(2.0, 2.0), (1.5, 1.8), (1.4, 1.81)],
        [(2.0, 2.0), (1.5, None)],
        [(2.0, None)],
    ],
)
def test_other_losses_are_not(tmp_path: Path, losses: list[tuple[float, float | None]]) -> None:
    assert read_overfitting(trained(tmp_path, losses)) is None


def evaluated(folder: Path, losses: dict[int, float]) -> RunDir:
    run = RunDir(folder)
    log = JsonlTracker(run, 1)
    for step, loss in losses.items():
        log.log(step, {"eval/forgetting/loss": loss, "train/loss": 1.0})
    return run


def test_the_last_evaluation_up_to_the_step_counts(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {0: 2.0, 10: 2.05, 20: 2.3, 30: 9.0})
    at_20, at_15 = read_general_loss(run, 20), read_general_loss(run, 15)
    assert at_20 is not None
    assert at_15 is not None
    assert (at_20.before, at_20.after, at_20.is_forgetting) == (2.0, 2.3, True)
    assert (at_15.after, at_15.is_forgetting) == (2.05, False)
    assert (at_20.measured_at, at_15.measured_at) == (None, 10)
    assert "until step 10, where it was measured last: no sign of forgetting" in describe_general_loss(at_15)
    assert "step" not in describe_general_loss(at_20)


@pytest.mark.parametrize("losses", [{0: 2.0}, {10: 2.0, 20: 2.1}, {}])
def test_without_a_loss_before_and_after_there_is_none(tmp_path: Path, losses: dict[int, float]) -> None:
    assert read_general_loss(evaluated(tmp_path, losses), 20) is None
