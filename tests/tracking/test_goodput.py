"""The breakdown of a run's time and its cost, from handwritten files; the parts always add up."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hand_made
import pytest
from plan_fixtures import PlanOf

from launcher.plan.gpu_types import Price
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, run_store
from launcher.runs.run_records import Attempt
from launcher.tracking import goodput
from launcher.tracking.goodput import (
    JOINED,
    LOADED,
    LOST,
    AttemptTimes,
    Breakdown,
    break_down,
)

RANKS = 4
H100, A100 = {"kind": "local", "gpu_type": "H100-80GB"}, {"kind": "local", "gpu_type": "A100-80GB"}
STATED, TYPICAL = Price(usd_per_gpu_hour=2.0), Price(usd_per_gpu_hour=2.95, assumption="typical")


def step(number: int, attempt: int, at: float, **more: float) -> dict[str, Any]:
    return {"trainer/step": number, "attempt": attempt, "time": at, "train/loss": 1.0, **more}


def phase(name: str, attempt: int, at: float, from_step: int = 0, ranks: int = RANKS) -> dict[str, Any]:
    return {"time": at, "attempt": attempt, "step": from_step, "kind": "info", "fields": {"phase": name, "ranks": ranks}}


def start(attempt: int, joined_at: float, loaded_at: float, from_step: int = 0, ranks: int = RANKS) -> list[dict[str, Any]]:
    return [phase(JOINED, attempt, joined_at, ranks=ranks), phase(LOADED, attempt, loaded_at, from_step, ranks)]


def parts(result: Breakdown) -> dict[str, float]:
    """Return the parts that are not 0, after checking their sum."""
    values = asdict(result)
    named = {name: values[name] for name in ("kept_s", *LOST)}
    assert sum(named.values()) == pytest.approx(result.wall_s)
    return {name: pytest.approx(value) for name, value in named.items() if value}


def test_an_attempt_from_the_queue_to_its_end() -> None:
    lines = [
        {"trainer/step": 0, "attempt": 1, "time": 143.0, "time/eval_s": 3.0},
        *(step(n, 1, 143 + 2 * n) for n in range(1, 11)),
        {"trainer/step": 10, "attempt": 1, "time": 164.0, "ckpt/stall_s": 1.0},
    ]
    result = break_down(lines, start(1, 120, 140), [AttemptTimes(1, 100, 110, 170, RANKS)], now=999)
    assert parts(result) == {"queue_s": 10, "start_s": 10, "load_s": 20, "eval_s": 3, "kept_s": 20, "save_s": 1, "other_s": 6}
    assert (result.wall_s, result.held_s, result.gpu_s, result.lost_steps) == (70, 60, 240, 0)
    assert result.goodput == pytest.approx(20 / 70)


def test_steps_after_the_checkpoint_that_the_next_attempt_began_from_are_lost() -> None:
    """They are lost even before they are repeated, and on another number of ranks."""
    first = [step(n, 1, 20 + 2 * n) for n in range(1, 6)]
    second = [step(n, 2, 90 + 2 * (n - 3)) for n in range(4, 6)]
    events = [*start(1, 10, 20), *start(2, 80, 90, from_step=3, ranks=2)]
    attempts = [AttemptTimes(1, 0, 5, 45, RANKS), AttemptTimes(2, 50, 70, None, RANKS)]
    result = break_down([*first, *second], events, attempts, now=94)
    assert parts(result) == {
        **{"queue_s": 5 + (70 - 45), "start_s": 5 + 10, "load_s": 10 + 10, "kept_s": 6 + 4, "replay_s": 4},
        "restart_s": 45 - 30,
    }
    assert result.lost_steps == 2
    assert (result.held_s, result.gpu_s) == (40 + 24, 40 * 4 + 24 * 2)
    assert break_down(first, events, attempts, now=85).lost_steps == 0
    assert break_down(first, events, attempts, now=90).lost_steps == 2


def test_time_until_a_person_resumes_is_idle_and_no_restart() -> None:
    attempts = [AttemptTimes(1, 0, 0, 40, RANKS, automatic=False), AttemptTimes(2, 4000, 4010, None, RANKS, automatic=False)]
    events = [*start(1, 0, 10), *start(2, 4020, 4030, from_step=3)]
    result = break_down([step(n, 1, 10 + 10 * n) for n in range(1, 4)], events, attempts, now=4030)
    assert parts(result) == {"kept_s": 30, "idle_s": 3960, "queue_s": 10, "start_s": 10, "load_s": 20}


def test_a_requeued_run_waits_in_the_queue_from_the_end_of_the_attempt_before() -> None:
    hour = 3600
    attempts = [AttemptTimes(1, 0, 0, hour, RANKS), AttemptTimes(2, 7 * hour, 7 * hour + 3, None, RANKS)]
    lines = [step(10, 1, hour)]
    result = break_down(lines, start(1, 0, 0), attempts, now=7 * hour + 3)
    assert parts(result) == {"kept_s": hour, "queue_s": 6 * hour + 3}


def test_a_node_with_a_slow_clock_gives_no_negative_time() -> None:
    """The node's timestamps are earlier than the submission."""
    lines, events = [step(1, 1, 830), step(2, 1, 890)], start(1, 770, 780)
    result = break_down(lines, events, [AttemptTimes(1, 1000, 760, None, RANKS, automatic=False)], now=1150)
    assert all(asdict(result)[name] >= 0 for name in ("kept_s", *LOST))
    assert (result.wall_s, result.held_s, result.kept_s) == (150, 150, 110)
    # The second attempt's node recorded an end before the first attempt ended.
    attempts = [AttemptTimes(1, 0, 0, 100, RANKS), AttemptTimes(2, 100, 105, 90, RANKS)]
    assert parts(break_down([], start(1, 0, 100), attempts, now=150)) == {"load_s": 100}


def test_ranks_that_restart_within_an_attempt() -> None:
    lines = [*(step(n, 1, 20 + n) for n in range(1, 5)), *(step(n, 1, 50 + n - 2) for n in range(3, 9))]
    events = [*start(1, 10, 20), *start(1, 40, 50, from_step=2)]
    result = break_down(lines, events, [AttemptTimes(1, 0, 0, 56, RANKS)], now=99)
    assert parts(result) == {"start_s": 10, "load_s": 20, "kept_s": 2 + 6, "replay_s": 2, "restart_s": 40 - 24}
    assert result.lost_steps == 2


def test_attempts_that_never_trained() -> None:
    attempts = [AttemptTimes(1, 0, 10, 20, RANKS), AttemptTimes(2, 20, 20, 50, RANKS), AttemptTimes(3, 50, None, None, RANKS)]
    result = break_down([], [phase(JOINED, 2, 30)], attempts, now=60)
    assert parts(result) == {"queue_s": 10 + 10, "start_s": 10 + 10, "load_s": 20}
    assert (result.held_s, result.gpu_s) == (40, 40 * RANKS)
    assert break_down([], [], [], now=60) == Breakdown()


def test_a_line_counts_for_all_steps_before_it() -> None:
    lines = [step(5, 1, 30), step(10, 1, 40)]
    events = [*start(1, 0, 20), *start(2, 60, 70, from_step=8)]
    result = break_down(lines, events, [AttemptTimes(1, 0, 0, 50, RANKS), AttemptTimes(2, 50, 50, None, RANKS)], now=70)
    assert (result.kept_s, result.replay_s, result.lost_steps) == (pytest.approx(16), pytest.approx(4), 2)


def test_the_live_breakdown_equals_the_one_from_the_files() -> None:
    """The numbers that rank 0 logs equal those that the report computes from all lines."""
    lines = [step(n, 1, 20 + n) for n in range(1, 5)]
    events = [*start(1, 10, 20), *start(2, 40, 50, from_step=2)]
    attempts = [AttemptTimes(1, 0, 5, 30, RANKS), AttemptTimes(2, 30, 35, None, RANKS)]
    before = break_down(lines, events, attempts, now=50)
    live = before.add_training(12.0, eval_s=2.0, save_s=1.0, num_ranks=4, price=None)
    more = [step(3, 2, 55), {"trainer/step": 3, "attempt": 2, "time": 58.0, "time/eval_s": 2.0, "ckpt/stall_s": 1.0}]
    assert break_down([*lines, *more, step(4, 2, 62)], events, attempts, now=62) == live


def test_the_files_of_a_long_run_are_read_quickly(make_plan: PlanOf, run_dir: Path) -> None:
    """10,000 steps and an attempt without an exit record. The time limit is generous, because other programs may run."""
    shutil.rmtree(run_dir)
    now = time.time()
    attempts = Attempt(None, submitted_at=now - 20_010, begun_at=now - 20_000), Attempt(None, begun_at=now - 100)
    run = hand_made.run(make_plan(), *attempts)
    metrics = {f"group/metric_{i}": 0.123456789 * i for i in range(50)}
    lines = [step(n, 1, now - 19_900 + n) | metrics for n in range(1, 10_001)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.events.write_text("".join(json.dumps(event) + "\n" for event in start(1, now - 19_950, now - 19_900)))
    began = time.perf_counter()
    result = goodput.read(run, now)
    took = time.perf_counter() - began
    assert result.kept_s == pytest.approx(10_000, abs=1)
    assert result.held_s == pytest.approx(10_100 + 100, abs=1), "held until its last line"
    assert goodput.read(run, now, "failed").held_s == pytest.approx(10_100, abs=1)
    assert took < 5


def test_an_attempt_that_never_joined_has_the_ranks_of_its_own_plan(make_plan: PlanOf, run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    plan = make_plan()
    run = hand_made.run(plan, *[Attempt(None)] * 3)
    larger = plan.topology.model_copy(update={"world_size": 2 * plan.topology.world_size})
    run_store.write_plan(run, 2, plan.model_copy(update={"topology": larger}))
    result = goodput.read_attempt_times(run)
    assert [attempt.num_ranks / plan.topology.world_size for attempt in result] == [1, 2, 2]


def test_an_attempt_whose_record_is_lost_counts_from_its_journal(make_plan: PlanOf, run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    run = hand_made.run(make_plan(), Attempt(None, submitted_at=50.0, begun_at=100.0))
    for at, state in ((60.0, "pending"), (100.0, "running")):
        hand_made.record(run, 1, "StatusChanged", at=at, status={"state": state, "attempt": 1})
    hand_made.end(run, ended_at=400.0)
    assert goodput.read(run, 500.0, "failed").held_s == 300
    (run.attempt(1) / "attempt.json").unlink()
    assert goodput.read(run, 500.0, "failed").held_s == 300


@pytest.mark.parametrize("word", [True, False])
def test_a_queued_run_spends_time_but_no_money(make_plan: PlanOf, run_dir: Path, word: bool) -> None:
    """This also holds if its machines were lost without a record, or if the attempt is numbered before its job is queued."""
    shutil.rmtree(run_dir)
    run = hand_made.run(
        make_plan().model_copy(update={"price": Price(usd_per_gpu_hour=3)}), Attempt(None, submitted_at=100.0, begun_at=100.0)
    )
    run.events.write_text("".join(json.dumps(event) + "\n" for event in start(1, 100, 100, ranks=2)))
    run.metrics.write_text(json.dumps(step(10, 1, 3700)) + "\n")
    if word:
        hand_made.end(run, ended_at=3700.0)
    for now in (3700.0, 3700 + 6 * 3600):
        result = goodput.read(run, now, "pending")
        assert parts(result) == ({"kept_s": 3600, "queue_s": now - 3700} if now > 3700 else {"kept_s": 3600})
        assert (result.held_s, result.usd) == (3600, pytest.approx(6))
        cost = goodput.read(run, now, "pending", only_cost=True)
        assert (cost.wall_s, cost.gpu_s, cost.usd) == (result.wall_s, result.gpu_s, result.usd)
    assert result.goodput == pytest.approx(1 / 7)
    assert goodput.read(run, now, "failed").wall_s == 3600
    run_store.create_attempt(run, Attempt(10, automatic=True))
    _submitted(run, 2, 3702.0)
    assert parts(goodput.read(run, now, "pending")) == parts(result)
    assert len(goodput.complete_attempts(goodput.read_attempt_times(run), "pending", [], [])) == 2


@pytest.mark.parametrize(
    ("plans", "usd", "assumed"),
    [
        ([(H100, TYPICAL), (A100, Price(usd_per_gpu_hour=1.6, assumption="typical"))], 295 + 160, 295 + 160),
        ([(H100, STATED), (H100, Price(usd_per_gpu_hour=2.5))], 200 + 250, 0),
        ([(H100, TYPICAL), (A100, Price(usd_per_gpu_hour=1.5))], 295 + 150, 295),
        ([(H100, TYPICAL), (H100, TYPICAL), (H100, STATED)], 600, 0),
        ([(H100, None), (H100, STATED)], 400, 0),
        ([(H100, STATED), (A100, None)], None, 0),
        ([(H100, None)], None, 0),
    ],
)
def test_a_later_plan_prices_attempts_without_a_known_price(
    make_plan: PlanOf,
    run_dir: Path,
    plans: list[tuple[dict[str, Any], Price | None]],
    usd: float | None,
    assumed: float,
) -> None:
    """Each attempt uses one GPU for 100 hours; the last plan may belong to the next attempt."""
    shutil.rmtree(run_dir)
    base = make_plan()
    made = [
        base.model_copy(
            update={
                "config": base.config.model_copy(update={"cluster": base.config.cluster.model_validate(cluster)}),
                "topology": base.topology.model_copy(update={"world_size": 1}),
                "price": price,
            }
        )
        for cluster, price in plans
    ]
    run = run_store.create(made[0])
    for i, plan in enumerate(made):
        with_next = goodput.read(run, 1e9, "failed", next_plan=plan)
        at = 1000.0 + 360_000 * i
        number = run_store.create_attempt(run, Attempt(None, begun_at=at))
        run_store.write_plan(run, number, plan)
        _submitted(run, number, at)
        hand_made.end(run, number, ended_at=at + 360_000)
    result = goodput.read(run, 1e9, "failed")
    assert result.gpu_s == 360_000 * len(plans)
    assert result.usd == (None if usd is None else pytest.approx(usd))
    assert result.assumed_usd == pytest.approx(assumed)
    if usd is not None and plans[-1][1] is not None:
        assert with_next.usd == pytest.approx(usd - 100 * plans[-1][1].usd_per_gpu_hour)


def _submitted(run: RunDir, number: int, at: float) -> None:
    values = json_records.read_json(run.attempt(number) / "attempt.json")
    atomic_files.write_json(run.attempt(number) / "attempt.json", {**values, "submitted_at": at})
