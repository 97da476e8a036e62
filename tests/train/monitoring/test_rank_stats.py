from __future__ import annotations

import math

import pytest

from launcher.train.monitoring.gpu_stats import Sample
from launcher.train.monitoring.rank_stats import SLOTS, Told, Work, metrics, ratio, told, work


def test_what_is_told_comes_back() -> None:
    first = Told(1.0, 0.5, 0.25, 0.125, 30.0, 40.0, 2.0, Sample(0, 0.9, 0.5, 600, 70, 2, 79, 0.1, 0.2))
    second = Told(1.0, 0.0, 0.25, sample=Sample(7, 0.8, 0.5, 600, 60, 0, 0, 0.3, 0.4))
    values = [*first.values(), *second.values()]
    assert len(values) == 2 * SLOTS
    assert told(values)[0] == first
    assert [math.isnan(value) for value in told(values)[1][3:7]] == [True] * 4
    assert told(values)[1].sample == second.sample


def test_in_lockstep_the_probe_tells_who_is_slow() -> None:
    ranks = [Told(2.0, 0.0, per_token) for per_token in (1e-6, 1e-6, 2e-6, 1e-6)]
    works = work(ranks)
    assert [one.seconds for one in works] == pytest.approx([1.0, 1.0, 2.0, 1.0])
    assert ratio(works) == pytest.approx(2.0)
    assert metrics(ranks, works) == pytest.approx({"time/step_max_rank_s": 2.0, "time/straggler_ratio": 2.0})


def test_a_rank_that_waits_for_its_data_is_waited_for_as_well() -> None:
    """The other rank waits inside the step, so its step takes as long without any data to wait for."""
    works = work([Told(2.0, 1.0, 1e-6), Told(2.0, 0.0, 1e-6)])
    assert works == [Work(1.0, 1.0), Work(1.0, 0.0)]
    assert ratio(works) == pytest.approx(2.0)


def test_a_wait_for_data_that_is_nothing_beside_the_step_is_no_matter() -> None:
    assert ratio(work([Told(2.0, 0.001, 1e-6), Told(2.0, 0.00001, 1e-6)])) == pytest.approx(1.0, abs=1e-3)


def test_a_rank_whose_optimizer_is_slow_on_its_cpus_is_waited_for_as_well() -> None:
    """One probed layer says nothing of that."""
    works = work([Told(9.0, 0.0, 1e-6, optim_s=5.0), Told(9.0, 0.0, 1e-6, optim_s=1.0), Told(9.0, 0.0, 1e-6, optim_s=1.0)])
    assert works == [Work(4.0, 0.0, 5.0), Work(4.0, 0.0, 1.0), Work(4.0, 0.0, 1.0)]
    assert ratio(works) == pytest.approx(1.8)


def test_memory_is_that_of_the_fullest_gpu() -> None:
    ranks = [
        Told(active=30.0 * 2**30, reserved=70.0 * 2**30, alloc_retries=3.0),
        Told(active=40.0 * 2**30, reserved=60.0 * 2**30),
    ]
    found = metrics(ranks, work(ranks))
    assert found == {"memory/peak_active_gib": 40.0, "memory/peak_reserved_gib": 70.0, "memory/alloc_retries": 3.0}


def test_without_numbers_there_are_no_metrics() -> None:
    assert metrics([Told(), Told()], work([Told(), Told()])) == {}
    assert ratio(work([Told(), Told()])) == 1.0
    alike = [Told(2.0, 0.5), Told(2.0, 0.5)]
    assert metrics(alike, work(alike))["time/straggler_ratio"] == 1.0


def test_the_devices_of_all_ranks_are_one_set_of_metrics() -> None:
    nan = math.nan
    samples = [Sample(0, 0.9, 0.5, 600, 70, 2, 79, 0.1, 0.2), Sample(1, 0.5, 0.7, 400, 80, 1, 48, nan, nan)]
    found = metrics([Told(sample=sample) for sample in samples], [])
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
