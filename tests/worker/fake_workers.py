"""Fake workers of a run on Ray, in a real run directory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hand_made
import pytest
from plan_fixtures import PlanOf

from launcher import run_store
from launcher.checkpoint import store
from launcher.clusters.check_results import OK, CheckResult, MachineReport, failure
from launcher.plan.launch_plan import LaunchPlan
from launcher.run_records import Attempt
from launcher.worker.ranks.watchdog import Beat
from launcher.worker.ray import coordinator as module
from launcher.worker.ray.coordinator import Coordinator
from launcher.worker.ray.messages import CheckNode, Member, Orders, RankSign

FIT = MachineReport("n", (CheckResult("packages", OK, "launcher 1, torch 2", must_match=True),))
KILLED = {"rank": 1, "kind": "killed", "at": 1.0, "exit_code": -9, "message": "killed by SIGKILL", "traceback": "", "log": ""}


class FakeWorkers:
    """A run on Ray whose workers report what the test sets."""

    def __init__(self, plan: LaunchPlan) -> None:
        self.plan = plan
        self.run = hand_made.run(plan, Attempt(None))
        self.draining: set[str] = set()
        self.lost: set[str] = set()
        self.coordinator = Coordinator(str(self.run.plan), 1, "here:1", lambda: self.draining, lambda: self.lost)

    def enter(self, group: str, nodes: list[str]) -> None:
        for rank, node in enumerate(nodes):
            member = Member(rank, nodes[:rank].count(node), node, f"id-{node}", "10.0.0.1", 4000 + rank)
            self.coordinator.enter(group, len(nodes), member)

    def check(self, group: str, nodes: list[str], problems: dict[str, str] | None = None) -> None:
        """The head worker of each node reports its check; `problems` are messages by node."""
        for rank, node in enumerate(nodes):
            orders = self.coordinator.orders(group, rank)
            if isinstance(orders, CheckNode):
                said = (problems or {}).get(node)
                found = (failure(said, "repair it"),) if said else ()
                self.coordinator.report_check(group, rank, MachineReport(node, (*FIT.results, *found)))

    def begin(self, group: str, *nodes: str) -> list[Orders | None]:
        """A new group enters, passes its checks and trains; returns the orders of all its workers."""
        self.enter(group, list(nodes))
        self.check(group, list(nodes))
        return [self.coordinator.orders(group, rank) for rank in range(len(nodes))]

    def end(self, rank: int, failure: dict[str, Any] | None = None, **said: Any) -> None:
        """Write a worker's node record."""
        hand_made.record(self.run, self.number, "NodeEnded", **{"node": rank, "host": "n", "first_failure": failure, **said})

    def outcome(self, reason: str, step: int) -> None:
        """Write rank 0's outcome."""
        state = "completed" if reason == "completed" else "preempted"
        hand_made.record(self.run, self.number, "TrainingEnded", state=state, reason=reason, step=step, message=reason)

    def save(self, step: int) -> None:
        files = {store.shard_name(0): b"x"}
        hand_made.checkpoint(self.run, step, attempt=self.number, files=files, digest=self.plan.digest())

    @property
    def number(self) -> int:
        return run_store.newest_attempt(self.run)

    @property
    def causes(self) -> list[str]:
        return hand_made.causes_of(self.run)


MakeFake = Callable[..., FakeWorkers]


@pytest.fixture
def make_fake(ray_plan: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeFake:
    """`make_fake(**cluster_settings)`; the coordinator reads the disk on each call."""
    monkeypatch.setattr(module, "_LOOK_S", -1.0)
    monkeypatch.setattr(module, "_DRAIN_LOOK_S", -1.0)
    return lambda **settings: FakeWorkers(ray_plan(working_dir=str(tmp_path), **settings))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that time.monotonic returns; the test sets it."""
    found = [10_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: found[0])
    return found


def sign(
    rank: int, silent_s: float, count: int = 500, state: str = "sleeping", trained: bool = True, phase: str = "training"
) -> RankSign:
    return RankSign(Beat(count, 4000 + rank, rank, phase, 16, 0.0, trained), silent_s, state)


def kind(orders: Orders | None) -> str | None:
    """The kind of orders in lower case; None if the worker must ask again."""
    return None if orders is None else type(orders).__name__.lower()
