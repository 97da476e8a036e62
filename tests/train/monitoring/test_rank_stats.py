from __future__ import annotations

import math

import pytest

from launcher.train.monitoring.anomalies import AnomalyDetector
from launcher.train.monitoring.gpu_stats import DeviceReadings
from launcher.train.monitoring.rank_stats import (
    NUM_VALUES,
    RankStats,
    RankWork,
    aggregate_metrics,
    estimate_work,
    straggler_ratio,
    unpack_ranks,
)


def test_statistics_survive_packing() -> None:
    first = RankStats(1.0, 0.5, 0.6, 0.25, 0.125, 30.0, 40.0, 2.0, DeviceReadings(0, 0.9, 0.5, 600, 70, 2, 79, 0.1, 0.2))
    second = RankStats(1.0, 0.0, 0.6, 0.25, device=DeviceReadings(7, 0.8, 0.5, 600, 60, 0, 0, 0.3, 0.4))
    values = [*first.values(), *second.values()]
    assert len(values) == 2 * NUM_VALUES
    assert unpack_ranks(values)[0] == first
    assert [math.isnan(value) for value in unpack_ranks(values)[1][4:8]] == [True] * 4
    assert unpack_ranks(values)[1].device == second.device


def test_in_lockstep_the_layer_times_show_the_slow_rank() -> None:
    ranks = [RankStats(2.0, 0.0, compute_s=per_token) for per_token in (1e-6, 1e-6, 2e-6, 1e-6)]
    works = estimate_work(ranks)
    assert [one.seconds for one in works] == pytest.approx([1.0, 1.0, 2.0, 1.0])
    assert straggler_ratio(works) == pytest.approx(2.0)
    assert aggregate_metrics(ranks, works) == pytest.approx({"time/step_max_rank_s": 2.0, "time/straggler_ratio": 2.0})


def test_waiting_for_data_makes_a_straggler() -> None:
    """The other rank waits inside the step, so both steps take equally long."""
    works = estimate_work([RankStats(2.0, 1.0, 2.5, 1e-6), RankStats(2.0, 0.0, 0.5, 1e-6)])
    assert works == [RankWork(1.0, 1.0), RankWork(1.0, 0.0)]
    assert straggler_ratio(works) == pytest.approx(2.0)


def test_data_that_take_all_ranks_as_long_make_no_straggler() -> None:
    """The ranks started at different times, so one waits longer in each step."""
    works = estimate_work([RankStats(0.30, 0.14, 0.301, 1e-6), RankStats(0.30, 0.06, 0.30, 1e-6)])
    assert straggler_ratio(works) == pytest.approx(1.0, abs=0.01)


def test_a_wait_for_data_that_is_short_beside_the_step_hardly_counts() -> None:
    works = estimate_work([RankStats(2.0, 0.001, 2.0, 1e-6), RankStats(2.0, 0.00001, 1.0, 1e-6)])
    assert straggler_ratio(works) == pytest.approx(1.0, abs=1e-3)


def test_a_slow_cpu_optimizer_makes_a_straggler() -> None:
    works = estimate_work([RankStats(9.0, 0.0, compute_s=1e-6, optim_s=optim_s) for optim_s in (5.0, 1.0, 1.0)])
    assert works == [RankWork(4.0, 0.0, 5.0), RankWork(4.0, 0.0, 1.0), RankWork(4.0, 0.0, 1.0)]
    assert straggler_ratio(works) == pytest.approx(1.8)


def test_memory_metrics_are_those_of_the_fullest_gpu() -> None:
    ranks = [
        RankStats(active=30.0 * 2**30, reserved=70.0 * 2**30, alloc_retries=3.0),
        RankStats(active=40.0 * 2**30, reserved=60.0 * 2**30),
    ]
    found = aggregate_metrics(ranks, estimate_work(ranks))
    assert found == {"memory/peak_active_gib": 40.0, "memory/peak_reserved_gib": 70.0, "memory/alloc_retries": 3.0}


def test_ranks_without_statistics_give_no_metrics() -> None:
    assert aggregate_metrics([RankStats(), RankStats()], estimate_work([RankStats(), RankStats()])) == {}
    assert straggler_ratio(estimate_work([RankStats(), RankStats()])) == 1.0
    alike = [RankStats(2.0, 0.5), RankStats(2.0, 0.5)]
    assert aggregate_metrics(alike, estimate_work(alike))["time/straggler_ratio"] == 1.0


def test_device_readings_of_all_ranks_are_aggregated() -> None:
    nan = math.nan
    devices = [DeviceReadings(0, 0.9, 0.5, 600, 70, 2, 79, 0.1, 0.2), DeviceReadings(1, 0.5, 0.7, 400, 80, 1, 48, nan, nan)]
    found = aggregate_metrics([RankStats(device=device) for device in devices], [])
    assert found == {
        "gpu/util_mean": pytest.approx(0.7),
        "gpu/util_min": 0.5,
        "gpu/temp_max": 80,
        "gpu/power_mean": 500,
        "gpu/memory_max_frac": 0.7,
        "gpu/xids": 3,
        "host/cpu_util_mean": 0.1,
        "host/ram_used_max_frac": 0.2,
    }


def test_memory_that_deviates_from_the_plan_is_an_alert_once() -> None:
    ranks = [RankStats(reserved=70.0 * 2**30), RankStats(reserved=77.0 * 2**30)]

    def alerts(planned_gib: float | None) -> list[str]:
        detector = AnomalyDetector("cuda", "/runs/a")
        return [text for _ in range(9) for text in detector.memory(ranks, planned_gib, ["n1", "n2"])]

    (above,) = alerts(70.0)
    assert above.startswith("the peak memory of rank 1 on n2 is 77.0 GiB, 10% above the planned 70.0 GiB: a longer batch may")
    (below,) = alerts(90.0)
    assert "14% below the planned 90.0 GiB: a larger train.micro_batch_size" in below
    assert alerts(75.0) == alerts(None) == []


def test_a_speed_that_deviates_from_the_plan_is_an_alert_once() -> None:
    # The first steps are slow because kernels are compiled.
    rates = [*([100.0] * 5), *([6000.0] * 60)]

    def alerts(planned: float | None) -> list[str]:
        detector = AnomalyDetector("cuda", "/runs/a")
        return [text for rate in rates for text in detector.speed(rate, planned)]

    (below,) = alerts(8000.0)
    assert below.startswith("training runs at 6,000 tokens/s, 25% below the planned 8,000: see what takes the time with: ")
    assert "report /runs/a" in below
    (above,) = alerts(4800.0)
    assert "25% above the planned 4,800: the rates that the plan assumes are too low" in above
    assert alerts(7000.0) == alerts(5100.0) == alerts(None) == []
