"""What a run records during training: costs, limits, faults and its status file."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import hand_made
import pytest
import torch
import torch.distributed as dist
from plan_fixtures import H100, PlanOf
from torch import nn

from launcher.distributed import RankInfo
from launcher.plan.gpu_types import Price
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import Attempt
from launcher.tracking.goodput import Breakdown, compute_cost, spent_limit
from launcher.tracking.jsonl import read_events
from launcher.tracking.tracker import Composite, RateLimit
from launcher.train.monitoring.monitor import Monitor, StatusFile, record_fault, spent_before

SPENT = Breakdown(wall_s=9000, held_s=7200, gpu_s=8 * 7200, usd=48.0)


def test_cost_is_what_was_paid_for_all_hours_so_far(plan_of: PlanOf) -> None:
    expected = compute_cost(plan_of("cluster.price_per_gpu_hour=1", device=H100), SPENT, tokens=2_000_000)
    assert expected == pytest.approx({"cost/gpu_hours": 16, "cost/usd": 48, "cost/usd_per_million_tokens": 24})
    assumed = plan_of(device=H100)
    assert compute_cost(assumed, SPENT, tokens=2_000_000) == expected
    assert compute_cost(assumed.model_copy(update={"price": None}), SPENT, 1) == {"cost/gpu_hours": 16}
    assert compute_cost(assumed, replace(SPENT, usd=None), 1) == {"cost/gpu_hours": 16}
    assert compute_cost(plan_of(), SPENT, 1) == {}
    on_cpus = compute_cost(plan_of("cluster.price_per_gpu_hour=3"), SPENT, tokens=2_000_000)
    assert on_cpus == expected, "a price makes a cost"
    later = SPENT.add_training(3600.0, 0.0, 0.0, 8, Price(usd_per_gpu_hour=1.5, assumption="typical"))
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
def test_limits_count_gpu_time_and_not_the_queue(plan_of: PlanOf, limits: tuple[str, ...], words: str) -> None:
    """The price paid so far differs from the plan's price."""
    assert spent_limit(plan_of("cluster.price_per_gpu_hour=1", *limits), SPENT) == words


def test_limits_count_all_the_time_with_machines(plan_of: PlanOf, tmp_path: Path) -> None:
    """The ranks were started three times within two hours and trained for only a few minutes."""
    plan = plan_of("run.max_hours=2", "run.max_usd=12", "cluster.price_per_gpu_hour=3")
    plan = plan.model_copy(update={"run_dir": str(tmp_path / "again")})
    begun = 1.8e9
    run = hand_made.run(plan, Attempt(None, submitted_at=begun - 3600, begun_at=begun))

    def event_line(at_s: float, step: int, **fields: Any) -> str:
        line = {"time": begun + at_s, "attempt": 1, "step": step, "kind": "info", "text": "", "fields": fields}
        return json.dumps(line) + "\n"

    def start(at_s: float) -> str:
        return event_line(at_s, 0, phase="joined", ranks=2) + event_line(at_s + 60, 0, phase="loaded")

    run.events.write_text("".join(map(start, (600, 3600, 7080))))
    line = {"train/loss": 2.0, "trainer/step": 5, "time": begun + 800, "attempt": 1}
    run.metrics.write_text(json.dumps(line) + "\n")

    def reached(at_s: float, later_s: float) -> str:
        return spent_limit(plan, spent_before(run, begun + at_s, pytest.fail).add_training(later_s, 0.0, 0.0, 2, plan.price))

    assert reached(7140, 59) == ""
    assert reached(7140, 61).startswith("run.max_usd=12 is reached after 4.00 GPU hours")
    hours = plan_of("run.max_hours=2", "cluster.price_per_gpu_hour=3")
    spent = spent_before(run, begun + 7140, pytest.fail)
    assert spent_limit(hours, spent.add_training(61, 0.0, 0.0, 2, plan.price)) == "run.max_hours=2 is reached"
    assert spent.kept_s == 0, "nothing was saved between the starts"


def test_an_unreadable_earlier_attempt_is_an_alert_and_does_not_end_training(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.attempts.mkdir()
    run_store.create_attempt(run, Attempt(None))
    run.plan.write_text('{"topology": 3}')
    alerts: list[str] = []
    assert spent_before(run, 0.0, alerts.append) == Breakdown()
    assert len(alerts) == 1
    assert alerts[0].startswith("the earlier cost of the run cannot be read, so goodput and cost count from here: ")


class EventRecorder:
    """A tracker that records its events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int | None]] = []

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        self.events.append((kind, text, step))


@pytest.fixture
def recorder() -> EventRecorder:
    return EventRecorder()


@pytest.fixture
def monitor(plan_of: PlanOf, tmp_path: Path, recorder: EventRecorder) -> Iterator[Monitor]:
    """The monitor of a single-rank run in `tmp_path`."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1, timeout=timedelta(seconds=30))
    plan = plan_of().model_copy(update={"run_dir": str(tmp_path)})
    tracker = Composite([recorder])  # type: ignore[list-item]
    made = Monitor(plan, RankInfo(0, 0, 1, 2, 0), torch.device("cpu"), nn.Module(), tracker)
    yield made
    made.stop()
    dist.destroy_process_group()


def test_a_lasting_anomaly_is_one_alert_with_its_step(monitor: Monitor, recorder: EventRecorder) -> None:
    monitor.update_ranks(monitor.pack_local())
    for step in range(60):
        monitor.alert(step, loss=2.0, tokens_per_sec=1000.0)
    for step in range(60, 90):
        monitor.alert(step, loss=9.0, tokens_per_sec=100.0)
    alerts = [(kind, text.partition(":")[0], step) for kind, text, step in recorder.events]
    assert alerts == [
        ("alert", "the loss jumped", 60),
        ("alert", "training has become slow", 64),
        ("alert", "the loss stays high", 79),
    ]


def test_an_xid_is_one_alert_and_a_full_disk_does_not_end_the_monitoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rank_info, limit = RunDir(tmp_path), RankInfo(0, 0, 1, 2, 0), RateLimit()
    for number in (79, 79, 48):
        record_fault(run, rank_info, "n1", limit, f"Xid {number} on GPU 3: it means something")
    alerts = [(event["kind"], event["attempt"], event["text"]) for event in read_events(run.events)]
    assert alerts == [("alert", 2, f"Xid {number} on GPU 3: it means something (rank 0 on n1)") for number in (79, 48)]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launcher.train.monitoring.monitor.append_event", full)
    monkeypatch.setattr("builtins.print", full)
    record_fault(run, rank_info, "n1", limit, "Xid 31 on GPU 3: it means something")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose second attempt has just started its ranks."""
    return hand_made.run(tmp_path / "demo", state="running", attempt=2, job={"id": "7"}, message="starting")


def step_on_disk(run: RunDir, step: int) -> bool:
    deadline = time.monotonic() + 20
    while run_store.read_status(run).step != step and time.monotonic() < deadline:
        time.sleep(0.01)
    return run_store.read_status(run).step == step


def no_alert(text: str) -> None:
    pytest.fail(text)


def test_a_state_is_on_disk_at_once_and_fields_of_others_are_kept(run: RunDir) -> None:
    file = StatusFile(run, 2, no_alert, is_main=True)
    file.write_state("saving", 12)
    status = run_store.read_status(run)
    assert (status.state, status.step, status.message) == ("saving", 12, "")
    assert (status.attempt, status.job, status.max_steps) == (2, {"id": "7"}, 40)
    StatusFile(run, 2, no_alert, is_main=False).write_state("running", 99)
    assert run_store.read_status(run) == status


def test_steps_are_written_now_and_then_without_holding_up_training(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each disk write blocks until the test releases it, as on storage that hangs."""
    monkeypatch.setattr("launcher.train.monitoring.monitor._UPDATE_INTERVAL_S", 0.05)
    through, writes, fsync = threading.Event(), [], os.fsync

    def slow(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            writes.append(descriptor)
            assert through.wait(30)
        fsync(descriptor)

    file = StatusFile(run, 2, no_alert, is_main=True)
    monkeypatch.setattr(os, "fsync", slow)
    began = time.monotonic()
    for step in range(1, 101):
        file.update_step(step)
        time.sleep(0.001)
    assert time.monotonic() - began < 10
    deadline = time.monotonic() + 20
    while not writes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(writes) == 1
    assert run_store.read_status(run).step == 0
    through.set()
    assert step_on_disk(run, 1)
    time.sleep(0.06)
    monkeypatch.setattr("launcher.train.monitoring.monitor._UPDATE_INTERVAL_S", 1e6)
    file.update_step(101)
    assert step_on_disk(run, 101)
    for _ in range(20):
        # Keep updating after the write of step 101 has ended.
        file.update_step(102)
        time.sleep(0.01)
    file.write_state("saving", 103)
    status = run_store.read_status(run)
    assert (status.state, status.step) == ("saving", 103)
    assert len(writes) == 3, "102 came too soon after 101"


def test_a_failed_write_is_an_alert(run: RunDir) -> None:
    run.status.unlink()
    run.status.mkdir()
    alerts: list[str] = []
    StatusFile(run, 2, alerts.append, is_main=True).write_state("running", 3)
    assert len(alerts) == 1
    assert alerts[0].startswith("status.json could not be written: ")


def test_a_superseded_attempt_writes_nothing(run: RunDir) -> None:
    file = StatusFile(run, 2, (alerts := []).append, is_main=True)
    run.attempt(3).mkdir(parents=True)
    run_store.update_status(run, attempt=3)
    file.write_state("running", 12)
    assert run_store.read_status(run).attempt == 3
    assert run_store.read_status(run).step == 0
    assert "attempt 3 has taken over" in alerts[0]
