"""Which ranks count as stalled and which are killed, from given heartbeats."""

from __future__ import annotations

import math

import psutil
import pytest

from launcher.worker.ranks.heartbeat import Beat
from launcher.worker.ranks.watchdog import StallLimits, StallVerdict, stalled

NOW = 100_000.0
LIMITS = StallLimits(stall_s=60, rare_s=1800)
ALIVE = {0: "running", 1: "sleeping"}


def beat(ago: float, count: int = 500, phase: str = "training", trained: bool = True) -> Beat:
    return Beat(count, 4242, 0, phase, 16, NOW - ago, trained)


def judge(
    beats: dict[int, Beat], states: dict[int, str] = ALIVE, limits: StallLimits = LIMITS, since: float = 0.0
) -> StallVerdict:
    return stalled(beats, states, NOW, limits, since)


def test_a_rank_with_heartbeats_is_not_stalled() -> None:
    assert judge({0: beat(1), 1: beat(59.9)}) == StallVerdict()
    assert judge({}) == StallVerdict()


@pytest.mark.parametrize(
    "state", [psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP, psutil.STATUS_ZOMBIE]
)
def test_a_rank_that_cannot_run_is_killed_at_once_and_alone(state: str) -> None:
    verdict = judge({0: beat(61), 1: beat(61)}, {0: "running", 1: state})
    assert verdict.stalled == {0: 61, 1: 61}
    assert list(verdict.kill) == [1]


def test_a_rank_that_cannot_run_is_killed_before_one_that_is_behind() -> None:
    verdict = judge({0: beat(80, count=499), 1: beat(80)}, {0: "running", 1: psutil.STATUS_STOPPED})
    assert list(verdict.kill) == [1]


def test_disk_sleep_between_heartbeats_is_no_stall() -> None:
    assert judge({0: beat(1), 1: beat(2)}, {0: "running", 1: psutil.STATUS_DISK_SLEEP}) == StallVerdict()


def test_a_rank_behind_the_others_is_killed_alone_and_after_a_quarter_more() -> None:
    beats = {0: beat(70), 1: beat(74, count=499), 2: beat(70)}
    states = {**ALIVE, 2: "running"}
    early = judge(beats, states)
    assert set(early.stalled) == {0, 1, 2}
    assert not early.kill
    assert list(judge({**beats, 1: beat(76, count=499)}, states).kill) == [1]


def test_a_rank_behind_is_found_although_others_sent_heartbeats_since() -> None:
    assert list(judge({0: beat(40), 1: beat(76, count=499)}).kill) == [1]


def test_the_rank_in_front_is_not_killed_for_being_silent_first() -> None:
    verdict = judge({0: beat(89, count=501), 1: beat(59, count=500)})
    assert set(verdict.stalled) == {0}
    assert not verdict.kill


def test_ranks_that_wait_for_another_node_are_killed_together_after_one_and_a_half_limits() -> None:
    waiting = judge({0: beat(89), 1: beat(88)})
    assert set(waiting.stalled) == {0, 1}
    assert not waiting.kill
    assert set(judge({0: beat(91), 1: beat(88)}).kill) == {0, 1}


@pytest.mark.parametrize("phase, limit", [("training", 60), ("evaluating", 60), ("saving", 1800)])
def test_the_limit_is_longer_while_saving(phase: str, limit: float) -> None:
    writing = {0: psutil.STATUS_DISK_SLEEP}
    assert judge({0: beat(limit - 1, phase=phase)}, writing) == StallVerdict()
    assert list(judge({0: beat(limit + 1, phase=phase)}, writing).kill) == [0]


def test_an_export_has_no_limit() -> None:
    assert judge({0: beat(10**6, phase="finishing")}, {0: psutil.STATUS_STOPPED}) == StallVerdict()


def test_ranks_that_have_not_trained_or_have_ended_are_not_judged() -> None:
    assert judge({0: beat(900, phase="loaded", trained=False), 1: beat(900, phase="evaluating", trained=False)}) == StallVerdict()
    assert judge({0: beat(900), 1: beat(1)}, {1: "running"}) == StallVerdict()
    # The count of a dead rank does not make the live one late either.
    assert not judge({0: beat(900, count=900), 1: beat(80)}, {1: "running"}).kill


def test_silence_from_before_the_watchdog_resumed_does_not_count() -> None:
    assert judge({0: beat(900), 1: beat(900)}, since=NOW - 30) == StallVerdict()
    assert set(judge({0: beat(900), 1: beat(900)}, since=NOW - 95).kill) == {0, 1}


def loading(ago: float, phase: str = "joined", trained: bool = False) -> Beat:
    return beat(ago, phase=phase, trained=trained)


@pytest.mark.parametrize("phase", ["starting", "joined", "loaded"])
def test_a_rank_that_cannot_run_is_killed_while_it_loads(phase: str) -> None:
    beats, states = {0: loading(61, phase), 1: loading(61, phase)}, {0: "sleeping", 1: psutil.STATUS_STOPPED}
    verdict = stalled(beats, states, NOW, LIMITS, since=0.0, others_at=math.inf)
    assert dict(verdict.kill) == {1: "is stopped by a signal (SIGSTOP)"}
    beats[1] = loading(59, phase)
    assert stalled(beats, states, NOW, LIMITS, since=0.0, others_at=math.inf) == StallVerdict()


def test_ranks_that_read_nothing_are_killed_only_where_no_rank_of_the_run_reads() -> None:
    beats = {0: loading(301), 1: loading(400)}
    for others_at in (-math.inf, NOW - 301):
        assert set(stalled(beats, ALIVE, NOW, LIMITS, 0.0, others_at).kill) == {0, 1}
    for others_at in (NOW - 299, math.inf):
        assert not stalled(beats, ALIVE, NOW, LIMITS, 0.0, others_at).kill
    for other in (loading(1), loading(1, trained=True), loading(900, "evaluating")):
        assert not stalled({**beats, 1: other}, ALIVE, NOW, LIMITS, 0.0, -math.inf).kill
    assert not stalled(beats, ALIVE, NOW, LIMITS, since=NOW - 30, others_at=-math.inf).kill
