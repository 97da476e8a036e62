from __future__ import annotations

import random

import pytest

from launcher.train.health import REPEAT_S, Health


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
