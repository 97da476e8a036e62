from __future__ import annotations

import math
import random
import threading
import time

import pytest

from launcher.train.devices import Sample
from launcher.train.health import REPEAT_S, Health, Pulse
from launcher.train.ranks import Told, work


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def quiet(health: Health, steps: int, loss: float = 2.0, pace: float = 1000.0) -> None:
    """Steps as they usually are, which give no alert."""
    numbers = random.Random(steps)
    for _ in range(steps):
        assert health.step(loss + numbers.gauss(0, 0.05), pace * numbers.uniform(0.9, 1.1)) == []


def test_a_loss_that_jumps_is_told_once_in_a_while(clock: Clock) -> None:
    health = Health(clock)
    quiet(health, 60)
    (words,) = health.step(4.0, 1000.0)
    assert "jumped to 4.0000: the median of the 60 steps before is 2.0" in words
    assert health.step(4.0, 1000.0) == []
    clock.now = REPEAT_S
    assert len(health.step(4.0, 1000.0)) == 1


def test_a_loss_that_falls_or_drifts_is_none(clock: Clock) -> None:
    health = Health(clock)
    for step in range(400):
        assert health.step(10.0 * 0.99**step, 1000.0) == []
    assert health.step(0.01, 1000.0) == []


def test_losses_that_are_all_alike_make_no_spike_of_a_trifle(clock: Clock) -> None:
    health = Health(clock)
    for _ in range(50):
        assert health.step(1.0, 1000.0) == []
    assert health.step(1.05, 1000.0) == []
    assert len(health.step(1.2, 1000.0)) == 1


def test_nothing_is_said_before_it_is_known_what_is_usual(clock: Clock) -> None:
    health = Health(clock)
    for loss in (11.0, 9.0, 7.0, 50.0, 6.0):
        assert health.step(loss, 1000.0) == []


def test_training_that_has_become_slow_is_told(clock: Clock) -> None:
    health = Health(clock)
    quiet(health, 100)
    said = [words for _ in range(10) for words in health.step(2.0, 500.0)]
    assert len(said) == 1
    assert "500 tokens/s over the last 10 steps" in said[0]


def test_one_slow_step_is_none(clock: Clock) -> None:
    health = Health(clock)
    quiet(health, 100)
    assert health.step(2.0, 10.0) == []
    quiet(health, 50)


HOSTS = ["n1", "n1", "n2", "n2"]


def told(slow: int | None = None, **different: float) -> list[Told]:
    """Four ranks in lockstep, of which one may tell other numbers."""
    usual = {"step_s": 2.0, "data_s": 0.001, "compute_s": 1e-6}
    return [Told(**(usual | different if rank == slow else usual)) for rank in range(4)]


def test_a_straggler_is_named_with_its_host_and_what_is_slow(clock: Clock) -> None:
    health = Health(clock)
    said = [words for _ in range(20) for words in health.stragglers(work(told(2, compute_s=1.5e-6)), HOSTS)]
    assert len(said) == 1
    assert "rank 2 on n2: it computes 1.50 times as long as the usual rank" in said[0]
    assert [words for _ in range(40) for words in health.stragglers(work(told(2, compute_s=1.5e-6)), HOSTS)] == []
    clock.now = REPEAT_S
    said = [words for _ in range(20) for words in health.stragglers(work(told(1, data_s=0.9)), HOSTS)]
    assert len(said) == 1
    assert "rank 1 on n1: it waits 0.90 s a step for its data, the usual rank 0.00 s" in said[0]


def test_a_rank_that_is_slow_now_and_then_is_none(clock: Clock) -> None:
    health = Health(clock)
    for step in range(200):
        assert list(health.stragglers(work(told(step % 4, compute_s=2e-6)), HOSTS)) == []
        assert list(health.stragglers(work(told(0, compute_s=1.1e-6)), HOSTS)) == []
    assert list(health.stragglers(work([Told()] * 4), HOSTS)) == []


def test_a_fault_of_a_gpu_is_told_once_with_what_it_means(clock: Clock) -> None:
    health = Health(clock)
    for count, number, words in ((0, math.nan, []), (1, 79, ["Xid 79 on GPU 5 of n2: fallen off the bus"]), (1, 79, [])):
        ranks = [Told(), Told(), Told(sample=Sample(gpu_index=5, xids=count, last_xid=number)), Told()]
        assert list(health.faults(ranks, HOSTS)) == words
    words = next(health.faults([Told(sample=Sample(gpu_index=0, xids=1, last_xid=1234))] * 4, HOSTS))
    assert words.startswith("Xid 1234 on GPU 0 of n1: see NVIDIA")


class Listener:
    def __init__(self) -> None:
        self.heard, self.said = threading.Event(), list[tuple[str, int]]()

    def __call__(self, words: str, step: int) -> None:
        self.said.append((words, step))
        self.heard.set()


def test_no_step_for_long_is_told_once_until_there_is_one() -> None:
    listener = Listener()
    pulse = Pulse(listener, look_s=0.01, at_least_s=0.3).start()
    for step in range(4):
        pulse.beat("training", step)
        time.sleep(0.01)
    for _ in range(2):
        assert listener.heard.wait(30)
        (words, step) = listener.said.pop()
        assert "no progress for 0 s while training; a step usually takes 0.0 s" in words
        listener.heard.clear()
        # Micro-batches of the same step are none.
        pulse.beat("training", step)
        assert not listener.heard.wait(0.5)
        pulse.beat("training", step + 1)
    pulse.stop()
    assert step == 4


@pytest.mark.parametrize("phases", [["training"], ["training", "training", "saving"], ["training", "training", "finishing"]])
def test_what_takes_long_by_its_nature_is_not_told(phases: list[str]) -> None:
    """The first step, a save, and what follows training."""
    listener = Listener()
    pulse = Pulse(listener, look_s=0.01, at_least_s=0.05).start()
    for step, phase in enumerate(phases):
        pulse.beat(phase, step)
    assert not listener.heard.wait(0.5)
    pulse.stop()
