from __future__ import annotations

import math
import random
import statistics
import threading
from collections.abc import Iterable

import pytest

from launcher.tracking.tracker import RateLimit
from launcher.train.monitoring import anomalies as module
from launcher.train.monitoring.anomalies import STANDS, Health, Pulse
from launcher.train.monitoring.gpu_stats import Sample
from launcher.train.monitoring.rank_stats import Told, work


def quiet(health: Health, steps: int, loss: float = 2.0, pace: float = 1000.0) -> None:
    """Steps as they usually are, which give no alert."""
    numbers = random.Random(steps)
    for _ in range(steps):
        assert health.step(loss + numbers.gauss(0, 0.05), pace * numbers.uniform(0.9, 1.1)) == []


def test_a_loss_that_jumps_is_told() -> None:
    health = Health("cuda")
    quiet(health, 60)
    (words,) = health.step(4.0, 1000.0)
    assert "the loss jumped: it is 4.0000, the median of the 60 steps before is 2.0" in words
    quiet(health, 1)


def test_a_loss_that_falls_or_drifts_is_none() -> None:
    health = Health("cuda")
    for step in range(400):
        assert health.step(10.0 * 0.99**step, 1000.0) == []
    assert health.step(0.01, 1000.0) == []


def test_losses_that_are_all_alike_make_no_spike_of_a_trifle() -> None:
    health = Health("cuda")
    for _ in range(50):
        assert health.step(1.0, 1000.0) == []
    assert health.step(1.05, 1000.0) == []
    assert len(health.step(1.2, 1000.0)) == 1


def test_nothing_is_said_before_it_is_known_what_is_usual() -> None:
    health = Health("cuda")
    for loss in (11.0, 9.0, 7.0, 50.0, 6.0):
        assert health.step(loss, 1000.0) == []


def test_training_that_has_become_slow_is_told() -> None:
    health = Health("cuda")
    quiet(health, 100)
    said = [health.step(2.0, 500.0) for _ in range(10)]
    assert not any(said[:4])
    assert "training has become slow: 500 tokens/s over the last 10 steps, " in said[-1][0]
    assert "GPUs" in said[-1][0]
    on_cpus = Health("cpu")
    quiet(on_cpus, 100)
    (words,) = [on_cpus.step(2.0, 500.0) for _ in range(10)][-1]
    assert "CPUs" in words
    assert "GPU" not in words


def test_one_slow_step_is_none() -> None:
    health = Health("cuda")
    quiet(health, 100)
    assert health.step(2.0, 10.0) == []
    quiet(health, 50)


def told_of(health: Health, steps: Iterable[tuple[float, float]]) -> list[str]:
    """What a run tells of these steps, each a loss and a pace, of which 900 take half an hour."""
    now = 0.0
    limit = RateLimit(lambda: now)
    told = []
    for loss, pace in steps:
        told += [words.partition(":")[0] for words in health.step(loss, pace) if limit.admit(words)]
        now += 2.0
    return told


def test_a_loss_that_stays_high_after_a_spike_that_passed_is_told() -> None:
    health = Health("cuda")
    quiet(health, 100)
    diverged = [(8.0 + math.sin(step), 1000.0) for step in range(2000)]
    said = told_of(health, [(4.0, 1000.0), *[(2.0, 1000.0)] * 150, *diverged])
    assert said == ["the loss jumped", "the loss does not come back"]
    # What has lasted is what is usual, so that another change is told.
    (words,) = health.step(80.0, 1000.0)
    assert "the loss jumped: it is 80.0000, the median of the 100 steps before is " in words


def test_training_that_stays_slow_after_a_dip_is_told() -> None:
    health = Health("cuda")
    quiet(health, 300)
    said = told_of(health, [*[(2.0, 400.0)] * 8, *[(2.0, 1000.0)] * 150, *[(2.0, 400.0)] * 2000])
    assert said == ["training has become slow", "training stays slow"]
    assert told_of(health, [(2.0, 150.0)] * 20) == ["training has become slow"]


HOSTS = ["n1", "n1", "n2", "n2"]


def told(slow: int | None = None, **different: float) -> list[Told]:
    """Four ranks in lockstep, of which one may tell other numbers."""
    usual = {"step_s": 2.0, "data_s": 0.001, "compute_s": 1e-6}
    return [Told(**(usual | different if rank == slow else usual)) for rank in range(4)]


def test_a_straggler_is_named_with_its_host_and_what_is_slow() -> None:
    health = Health("cuda")
    said = [words for _ in range(20) for words in health.stragglers(work(told(2, compute_s=1.5e-6)), HOSTS)]
    assert len(said) == 1
    assert said[0].startswith("a straggler: all ranks have waited 20 steps for rank 2 on n2: it computes 1.50 times as long as ")
    said = [words for _ in range(20) for words in health.stragglers(work(told(1, data_s=0.9)), HOSTS)]
    assert len(said) == 1
    assert "rank 1 on n1: it waits 0.90 s a step for its data, the usual rank 0.00 s" in said[0]
    said = [words for _ in range(20) for words in health.stragglers(work(told(3, optim_s=0.7)), HOSTS)]
    assert len(said) == 1
    assert "rank 3 on n2: its optimizer takes 0.70 s a step on the CPUs, the usual rank's 0.00 s" in said[0]


def test_a_rank_that_is_slow_now_and_then_is_none() -> None:
    health = Health("cuda")
    for step in range(200):
        assert list(health.stragglers(work(told(step % 4, compute_s=2e-6)), HOSTS)) == []
        assert list(health.stragglers(work(told(0, compute_s=1.1e-6)), HOSTS)) == []
    assert list(health.stragglers(work([Told()] * 4), HOSTS)) == []


def test_a_fault_of_a_gpu_is_told_once_with_what_it_means() -> None:
    health = Health("cuda")
    for count, number, words in ((0, math.nan, []), (1, 79, ["Xid 79 on GPU 5 of n2: fallen off the bus"]), (1, 79, [])):
        ranks = [Told(), Told(), Told(sample=Sample(gpu_index=5, xids=count, last_xid=number)), Told()]
        assert list(health.faults(ranks, HOSTS)) == words
    words = next(health.faults([Told(), Told(sample=Sample(gpu_index=0, xids=1, last_xid=1234)), Told(), Told()], HOSTS))
    assert words.startswith(f"Xid 1234 on GPU 0 of {HOSTS[1]}: see NVIDIA")


def test_a_fault_that_shows_on_many_gpus_is_one_alert() -> None:
    ranks = [Told(sample=Sample(gpu_index=i, xids=1, last_xid=79 if i == 2 else 74)) for i in range(4)]
    nvlink, lost = Health("cuda").faults(ranks, HOSTS)
    assert nvlink.startswith(f"Xid 74 on 3 GPUs, the first of them GPU 0 of {HOSTS[0]}: ")
    assert lost.startswith(f"Xid 79 on GPU 2 of {HOSTS[2]}: ")


class Watched:
    """A pulse with a clock that is set by hand, and what it has told."""

    def __init__(self, at_least_s: float = 0.0) -> None:
        self.now, self.told = 0.0, list[tuple[str, int]]()
        self.pulse = Pulse(lambda words, step: self.told.append((words, step)), at_least_s, lambda: self.now)

    def train(self, steps_s: list[float]) -> None:
        for step, seconds in enumerate(steps_s):
            self.now += seconds
            self.pulse.beat("training", step)

    def look_after(self, seconds: float) -> list[tuple[str, int]]:
        self.now += seconds
        self.told.clear()
        self.pulse.look()
        return self.told


def test_no_step_for_some_times_the_median_step_is_told() -> None:
    steps_s = [9.0, 2.0, 2.1, 1.9, 30.0, 2.0]
    watched = Watched()
    watched.train(steps_s)
    # Of the first step nobody knows when it began.
    median_s = statistics.median(steps_s[1:])
    assert watched.look_after(STANDS * median_s - 0.1) == []
    assert watched.look_after(0.2) == [("no progress: 20 s have passed while training; a step usually takes 2.0 s", 5)]
    # Micro-batches of the same step are none.
    watched.pulse.beat("training", 5)
    assert len(watched.look_after(0.0)) == 1
    watched.pulse.beat("training", 6)
    assert watched.look_after(0.0) == []


def test_where_steps_are_short_a_pause_is_not_told_at_once() -> None:
    watched = Watched(at_least_s=60.0)
    watched.train([0.1] * 10)
    assert watched.look_after(59.0) == []
    assert len(watched.look_after(2.0)) == 1


@pytest.mark.parametrize(
    "phases, silent_s",
    [(["training"], 1e6), (["training", "training", "saving"], 899.0), (["training", "training", "finishing"], 1e6)],
)
def test_what_takes_long_by_its_nature_is_not_told(phases: list[str], silent_s: float) -> None:
    """The first step, a save, and what follows training."""
    watched = Watched()
    for step, phase in enumerate(phases):
        watched.now += 2.0
        watched.pulse.beat(phase, step)
    assert watched.look_after(silent_s) == []


def test_a_thread_looks_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    heard = threading.Event()
    pulse = Pulse(lambda words, step: heard.set(), at_least_s=0.0)
    for step in range(3):
        pulse.beat("training", step)
    assert pulse.start() is pulse
    assert heard.wait(30)
    pulse.stop()
