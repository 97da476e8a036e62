from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plan_fixtures import H100
from torch import nn

from launcher import run_store
from launcher.distributed import RankInfo
from launcher.plan.gpus import Price
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking.goodput import Breakdown, cost, spent_limit
from launcher.tracking.jsonl import read_events
from launcher.tracking.tracker import Composite, RateLimit
from launcher.train.monitoring.monitor import Monitor, record_fault, spent_before

PlanOf = Callable[..., LaunchPlan]
SPENT = Breakdown(wall_s=9000, held_s=7200, gpu_s=8 * 7200, usd=48.0)


def test_money_is_what_was_paid_for_all_hours_so_far(plan_of: PlanOf) -> None:
    told = cost(plan_of("cluster.price_per_gpu_hour=1", device=H100), SPENT, tokens=2_000_000)
    assert told == pytest.approx({"cost/gpu_hours": 16, "cost/usd": 48, "cost/usd_per_million_tokens": 24})
    assumed = plan_of(device=H100)
    assert cost(assumed, SPENT, tokens=2_000_000) == told
    assert cost(assumed.model_copy(update={"price": None}), SPENT, 1) == {"cost/gpu_hours": 16}
    assert cost(assumed, replace(SPENT, usd=None), 1) == {"cost/gpu_hours": 16}
    assert cost(plan_of(), SPENT, 1) == {}
    on_cpus = cost(plan_of("cluster.price_per_gpu_hour=3"), SPENT, tokens=2_000_000)
    assert on_cpus == told, "who names a price is told what it comes to"
    later = SPENT.later(3600.0, 0.0, 0.0, 8, Price(usd_per_gpu_hour=1.5, assumption="typical"))
    assert (later.gpu_s, later.usd, later.assumed_usd) == (8 * 10_800, pytest.approx(48 + 12), pytest.approx(12))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ((), ""),
        (("run.max_hours=2.1", "run.max_usd=48.1"), ""),
        (("run.max_hours=2",), "run.max_hours=2 is reached"),
        (("run.max_hours=2.1", "run.max_usd=48"), "run.max_usd=48 is reached after 16.00 GPU hours"),
    ],
)
def test_what_is_bought_is_gpu_time_and_a_queue_costs_nothing(plan_of: PlanOf, limits: tuple[str, ...], words: str) -> None:
    """At the price that it had; that of the plan is another."""
    assert spent_limit(plan_of("cluster.price_per_gpu_hour=1", *limits), SPENT) == words


def test_limits_count_all_that_an_attempt_has_held_machines_for(plan_of: PlanOf, tmp_path: Path) -> None:
    """Its ranks were started three times within two hours, and have trained for a few minutes of them."""
    plan = plan_of("run.max_hours=2", "run.max_usd=12", "cluster.price_per_gpu_hour=3")
    plan = plan.model_copy(update={"run_dir": str(tmp_path / "again")})
    run, begun = run_store.create(plan), 1.8e9
    run_store.create_attempt(run, Attempt(None))
    run_store.write_attempt(run, 1, Attempt(None, submitted_at=begun - 3600, begun_at=begun))

    def told(at_s: float, step: int, **fields: Any) -> str:
        line = {"time": begun + at_s, "attempt": 1, "step": step, "kind": "info", "text": "", "fields": fields}
        return json.dumps(line) + "\n"

    starts = [told(at_s, 0, phase="joined", ranks=2) + told(at_s + 60, 0, phase="loaded") for at_s in (600, 3600, 7080)]
    run.events.write_text("".join(starts))
    line = {"train/loss": 2.0, "trainer/step": 5, "time": begun + 800, "attempt": 1}
    run.metrics.write_text(json.dumps(line) + "\n")

    def reached(at_s: float, later_s: float) -> str:
        return spent_limit(plan, spent_before(run, begun + at_s, pytest.fail).later(later_s, 0.0, 0.0, 2, plan.price))

    assert reached(7140, 59) == ""
    assert reached(7140, 61).startswith("run.max_usd=12 is reached after 4.00 GPU hours")
    hours = plan_of("run.max_hours=2", "cluster.price_per_gpu_hour=3")
    spent = spent_before(run, begun + 7140, pytest.fail)
    assert spent_limit(hours, spent.later(61, 0.0, 0.0, 2, plan.price)) == "run.max_hours=2 is reached"
    assert spent.kept_s == 0, "nothing was saved between the starts"


def test_what_cannot_be_read_of_the_run_before_ends_no_training(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.attempts.mkdir()
    run_store.create_attempt(run, Attempt(None))
    run.plan.write_text('{"topology": 3}')
    said: list[str] = []
    assert spent_before(run, 0.0, said.append) == Breakdown()
    assert len(said) == 1
    assert said[0].startswith("what the run has done before cannot be read, so it counts from here: ")


class Heard:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, int | None]] = []

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        self.said.append((kind, text, step))


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def monitor(plan_of: PlanOf, tmp_path: Path, heard: Heard) -> Iterator[Monitor]:
    """That of the only rank of a run in `tmp_path`."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1, timeout=timedelta(seconds=30))
    plan = plan_of().model_copy(update={"run_dir": str(tmp_path)})
    tracker = Composite([heard])  # type: ignore[list-item]
    made = Monitor(plan, RankInfo(0, 0, 1, 2, 0), torch.device("cpu"), nn.Module(), None, tracker, lambda phase, step: None)
    yield made
    made.stop()
    dist.destroy_process_group()


def test_what_lasts_is_told_once_with_the_step(monitor: Monitor, heard: Heard) -> None:
    monitor.heard(monitor.own())
    for step in range(60):
        monitor.alert(step, loss=2.0, tokens_per_sec=1000.0)
    for step in range(60, 90):
        monitor.alert(step, loss=9.0, tokens_per_sec=100.0)
    told = [(kind, text.partition(":")[0], step) for kind, text, step in heard.said]
    assert told == [
        ("alert", "the loss jumped", 60),
        ("alert", "training has become slow", 64),
        ("alert", "the loss does not come back", 79),
    ]


def test_an_xid_is_an_alert_once_and_a_full_disk_does_not_end_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, place, limit = RunDir(tmp_path), RankInfo(0, 0, 1, 2, 0), RateLimit()
    for number in (79, 79, 48):
        record_fault(run, place, "n1", limit, f"Xid {number} on GPU 3: it means something")
    told = [(event["kind"], event["attempt"], event["text"]) for event in read_events(run.events)]
    assert told == [("alert", 2, f"Xid {number} on GPU 3: it means something (rank 0 on n1)") for number in (79, 48)]

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launcher.train.monitoring.monitor.append_event", full)
    record_fault(run, place, "n1", limit, "Xid 31 on GPU 3: it means something")
