from __future__ import annotations

import math
import random
from collections.abc import Iterable

from launcher.tracking.tracker import RateLimit
from launcher.train.monitoring.anomalies import AnomalyDetector
from launcher.train.monitoring.step_metrics import DeviceReadings, RankStats, estimate_work


def run_normal_steps(detector: AnomalyDetector, steps: int, loss: float = 2.0, pace: float = 1000.0) -> None:
    """Feed normal steps; check that none raises an alert."""
    numbers = random.Random(steps)
    for _ in range(steps):
        assert detector.step(loss + numbers.gauss(0, 0.05), pace * numbers.uniform(0.9, 1.1)) == []


def test_a_loss_spike_is_an_alert() -> None:
    detector = AnomalyDetector("cuda", "runs/demo")
    run_normal_steps(detector, 60)
    (text,) = detector.step(4.0, 1000.0, 61)
    assert "the loss jumped: it is 4.0000, the median of the 60 steps before is 2.0" in text
    assert "why runs/demo 61" in text
    run_normal_steps(detector, 1)


def test_a_falling_loss_is_no_alert() -> None:
    detector = AnomalyDetector("cuda", "runs/demo")
    for step in range(400):
        assert detector.step(10.0 * 0.99**step, 1000.0) == []
    assert detector.step(0.01, 1000.0) == []


def test_a_small_change_of_a_constant_loss_is_no_spike() -> None:
    detector = AnomalyDetector("cuda", "runs/demo")
    for _ in range(50):
        assert detector.step(1.0, 1000.0) == []
    assert detector.step(1.05, 1000.0) == []
    assert len(detector.step(1.2, 1000.0)) == 1


def test_a_slowdown_is_an_alert_with_causes_of_the_device() -> None:
    detector = AnomalyDetector("cuda", "runs/demo")
    run_normal_steps(detector, 100)
    alerts = [detector.step(2.0, 500.0) for _ in range(10)]
    assert not any(alerts[:4])
    assert "training has become slow: 500 tokens/s over the last 10 steps, " in alerts[-1][0]
    assert "GPUs" in alerts[-1][0]
    on_cpus = AnomalyDetector("cpu", "runs/demo")
    run_normal_steps(on_cpus, 100)
    (text,) = [on_cpus.step(2.0, 500.0) for _ in range(10)][-1]
    assert "CPUs" in text
    assert "GPU" not in text


def alert_kinds(detector: AnomalyDetector, steps: Iterable[tuple[float, float]]) -> list[str]:
    """Return the kinds of alerts for steps of (loss, pace), two seconds apart: 900 steps take half an hour."""
    now = 0.0
    limit = RateLimit(lambda: now)
    kinds = []
    for loss, pace in steps:
        kinds += [text.partition(":")[0] for text in detector.step(loss, pace) if limit.admit(text)]
        now += 2.0
    return kinds


def test_a_loss_that_stays_high_is_an_alert_even_after_a_passing_spike() -> None:
    detector = AnomalyDetector("cuda", "runs/demo")
    run_normal_steps(detector, 100)
    diverged = [(8.0 + math.sin(step), 1000.0) for step in range(2000)]
    alerts = alert_kinds(detector, [(4.0, 1000.0), *[(2.0, 1000.0)] * 150, *diverged])
    assert alerts == ["the loss jumped", "the loss stays high"]
    # The lasting level becomes the reference for the next change.
    (text,) = detector.step(80.0, 1000.0)
    assert "the loss jumped: it is 80.0000, the median of the 100 steps before is " in text


def test_training_that_stays_slow_is_an_alert_even_after_a_passing_dip() -> None:
    detector = AnomalyDetector("cuda", "runs/demo")
    run_normal_steps(detector, 300)
    alerts = alert_kinds(detector, [*[(2.0, 400.0)] * 8, *[(2.0, 1000.0)] * 150, *[(2.0, 400.0)] * 2000])
    assert alerts == ["training has become slow", "training stays slow"]
    assert alert_kinds(detector, [(2.0, 150.0)] * 20) == ["training has become slow"]


HOSTS = ["n1", "n1", "n2", "n2"]


def four_ranks(slow: int | None = None, **different: float) -> list[RankStats]:
    """Return statistics of four ranks in lockstep, of which rank `slow` differs."""
    usual = {"step_s": 2.0, "data_s": 0.001, "load_s": 0.1, "compute_s": 1e-6}
    return [RankStats(**(usual | different if rank == slow else usual)) for rank in range(4)]


def test_a_straggler_alert_names_rank_host_and_cause() -> None:
    detector = AnomalyDetector("cuda", "runs/demo")
    alerts = [text for _ in range(20) for text in detector.stragglers(estimate_work(four_ranks(2, compute_s=1.5e-6)), HOSTS)]
    assert len(alerts) == 1
    assert alerts[0].startswith(
        "a straggler: all ranks have waited 20 steps for rank 2 on n2: it computes 1.50 times as long as "
    )
    alerts = [
        text for _ in range(20) for text in detector.stragglers(estimate_work(four_ranks(1, data_s=0.9, load_s=1.0)), HOSTS)
    ]
    assert len(alerts) == 1
    assert "rank 1 on n1: its data take 0.90 s a step longer than the median rank's: check" in alerts[0]


def test_a_rank_that_is_slow_in_some_steps_is_no_straggler() -> None:
    detector = AnomalyDetector("cuda", "runs/demo")
    for step in range(200):
        assert list(detector.stragglers(estimate_work(four_ranks(step % 4, compute_s=2e-6)), HOSTS)) == []
        assert list(detector.stragglers(estimate_work(four_ranks(0, compute_s=1.1e-6)), HOSTS)) == []
    assert list(detector.stragglers(estimate_work([RankStats()] * 4), HOSTS)) == []


def test_an_xid_is_one_alert_with_its_meaning() -> None:
    detector = AnomalyDetector("cuda", "runs/demo")
    for count, number, text in ((0, math.nan, []), (1, 79, ["Xid 79 on GPU 5 of n2: fallen off the bus"]), (1, 79, [])):
        ranks = [
            RankStats(),
            RankStats(),
            RankStats(device=DeviceReadings(gpu_index=5, xids=count, last_xid=number)),
            RankStats(),
        ]
        assert list(detector.faults(ranks, HOSTS)) == text
    text = next(
        detector.faults(
            [RankStats(), RankStats(device=DeviceReadings(gpu_index=0, xids=1, last_xid=1234)), RankStats(), RankStats()], HOSTS
        )
    )
    assert text.startswith(f"Xid 1234 on GPU 0 of {HOSTS[1]}: see NVIDIA")


def test_an_xid_on_several_gpus_is_one_alert() -> None:
    ranks = [RankStats(device=DeviceReadings(gpu_index=i, xids=1, last_xid=79 if i == 2 else 74)) for i in range(4)]
    nvlink, lost = AnomalyDetector("cuda", "runs/demo").faults(ranks, HOSTS)
    assert nvlink.startswith(f"Xid 74 on 3 GPUs, the first of them GPU 0 of {HOSTS[0]}: ")
    assert lost.startswith(f"Xid 79 on GPU 2 of {HOSTS[2]}: ")
