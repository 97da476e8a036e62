from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from plan_fixtures import H100

from launcher.plan.launch_plan import LaunchPlan, Limits
from launcher.plan.run_dir import RunDir
from launcher.tracking import goodput
from launcher.tracking.goodput import Breakdown, cost, spent_limit
from launcher.tracking.jsonl import read_events
from launcher.train.engine import Place
from launcher.train.monitor import Monitor

PlanOf = Callable[..., LaunchPlan]
SPENT = Breakdown(wall_s=9000, held_s=7200, gpu_s=8 * 7200)


def test_money_follows_the_price_of_the_plan_over_the_whole_run(plan_of: PlanOf) -> None:
    told = cost(plan_of("cluster.price_per_gpu_hour=3", device=H100), SPENT, tokens=2_000_000)
    assert told == pytest.approx({"cost/gpu_hours": 16, "cost/usd": 48, "cost/usd_per_million_tokens": 24})
    assumed = plan_of(device=H100)
    assert assumed.price is not None
    assert cost(assumed, SPENT, 1)["cost/usd"] == pytest.approx(16 * assumed.price.usd_per_gpu_hour)
    assert cost(assumed.model_copy(update={"price": None}), SPENT, 1) == {"cost/gpu_hours": 16}
    assert cost(plan_of(), SPENT, 1) == {}
    on_cpus = cost(plan_of("cluster.price_per_gpu_hour=3"), SPENT, tokens=2_000_000)
    assert on_cpus == told, "who names a price is told what it comes to"


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_seconds=None), ""),
        (Limits(max_seconds=7201, max_gpu_seconds=57601), ""),
        (Limits(max_seconds=7200), "run.max_hours=2 is reached"),
        (Limits(max_seconds=7201, max_gpu_seconds=57600), "run.max_usd=48 is reached after 16.00 GPU hours"),
    ],
)
def test_what_is_bought_is_gpu_time_and_a_queue_costs_nothing(plan_of: PlanOf, limits: Limits, words: str) -> None:
    plan = plan_of("run.max_hours=2", "run.max_usd=48", "cluster.price_per_gpu_hour=3")
    assert spent_limit(plan.model_copy(update={"limits": limits}), SPENT) == words


def test_what_cannot_be_read_of_the_run_before_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(run: RunDir, now: float) -> Breakdown:
        raise TypeError("'<' not supported")

    monkeypatch.setattr(goodput, "read", damaged)
    said: list[str] = []
    monitor = object.__new__(Monitor)
    monitor._run = RunDir(tmp_path)
    monitor._tracker = SimpleNamespace(event=lambda kind, text: said.append(f"{kind}: {text}"))  # type: ignore[assignment]
    assert monitor._read(0.0) == Breakdown()
    assert said == ["alert: what the run has done before cannot be read, so it counts from here: '<' not supported"]


def test_an_xid_is_an_alert_and_a_full_disk_does_not_end_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = object.__new__(Monitor)
    monitor._run, monitor._place, monitor._hosts = RunDir(tmp_path), Place(0, 0, 1, 2, 0), ["n1"]
    monitor._on_xid("Xid 79 on GPU 3")
    told = read_events(monitor._run.events)
    assert [(event["kind"], event["attempt"], event["text"]) for event in told] == [
        ("alert", 2, "Xid 79 on GPU 3 (rank 0 on n1)")
    ]

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launcher.train.monitor.append_event", full)
    monitor._on_xid("Xid 79 on GPU 3")
