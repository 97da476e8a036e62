"""What a worker of Ray tells the coordinator about its rank, which is a real process here that fails at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from played_workers import Played

from launcher.plan.launch_plan import LaunchPlan
from launcher.worker.ray import supervisor

NOTHING = {"signal": None, "stacks": False, "hung": None, "saved": [], "verdict": None}


class Told(supervisor._Worker):
    """A worker without a Ray, whose coordinator gives the `answer`; `told` is what it hears, in this order."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.rank = self.local_rank = 0
        self.node = "n1"
        self.answer, self.told = answer, list[str | None]()

    def _beat(self, ended: str | None, sign: dict[str, Any] | None = None) -> dict[str, Any]:
        self.told.append(ended)
        return self.answer


class Endless:
    """A mirror that is never done."""

    def __init__(self, worker: Told) -> None:
        self._worker = worker

    def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
        self._worker.told.append("mirrors")
        assert until < time.time() + 60
        assert not unwanted()


def test_that_a_rank_has_failed_is_told_before_the_mirror_is_waited_for(
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Played(ray_plan(working_dir=str(tmp_path), workers=1))
    worker = Told(NOTHING)
    monkeypatch.setattr(supervisor.MirrorProcess, "start", lambda *_: Endless(worker))
    monkeypatch.setattr(supervisor.sys, "executable", "/bin/false")
    place = {"rank": 0, "world_size": 1, "local_size": 1, "address": "127.0.0.1", "port": 1, "peers": ["127.0.0.1"]}
    orders = {**place, "attempt": 1, "plan": str(played.run.plan), "environment": {}}
    assert worker._train(orders) == "failed"
    assert worker.told[worker.told.index("failed") :] == ["failed", "mirrors", None]


@pytest.mark.parametrize(
    "answer, failed, others_wait",
    [
        ({}, False, False),
        ({"signal": "TERM"}, False, True),
        ({"signal": "TERM"}, True, False),
        ({"signal": "TERM", "verdict": {"again": False, "reason": ""}}, True, False),
        ({"signal": "TERM", "verdict": {"again": True, "reason": ""}}, True, True),
        ({"signal": "KILL"}, True, True),
    ],
)
def test_the_mirror_is_left_where_another_attempt_or_a_person_waits(
    answer: dict[str, Any], failed: bool, others_wait: bool
) -> None:
    assert Told({**NOTHING, **answer})._is_wanted_elsewhere(failed) is others_wait
