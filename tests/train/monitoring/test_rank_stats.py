"""Timers on two real ranks of a ZeRO-3 engine identify the rank that computes slowly, not the one that waits.

GPU readings from a fake NVML and of CUDA's memory statistics, because the test machine has no GPU.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import hand_made
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from fake_nvml import Nvml, NVMLError, NVMLError_GpuIsLost, NVMLError_ResetRequired
from fake_wandb import history
from forked_ranks import RankServer
from plan_fixtures import H100, PlanOf
from torch import nn

from launcher.data.loader import TrainBatches
from launcher.data.split import Split
from launcher.distributed import RankInfo
from launcher.plan.planner import planned_tokens_per_sec
from launcher.runs.run_records import Attempt
from launcher.tracking.tracker import start_trackers
from launcher.train.monitoring import step_metrics
from launcher.train.monitoring.anomalies import AnomalyDetector
from launcher.train.monitoring.monitor import Monitor
from launcher.train.monitoring.step_metrics import (
    DeviceMonitor,
    DeviceReadings,
    LayerTimer,
    Meter,
    RankStats,
    RankWork,
    aggregate_metrics,
    estimate_work,
    representative_layer,
    straggler_ratio,
)

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
GIB = 2**30
TIMES = {"time/step_s": 0.5, "time/data_s": 0.1}
MEMORY = {"active_bytes.all.peak": 30 * GIB, "reserved_bytes.all.peak": 40 * GIB, "num_alloc_retries": 2}
COST = {"cost/gpu_hours", "cost/usd", "cost/usd_per_million_tokens"}


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


@pytest.fixture(scope="module")
def ranks(rank_server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return rank_server.values("train_ranks:probe_engine", [[], []], tmp_path_factory.mktemp("probe"))


@pytest.mark.rest
def test_only_the_slow_rank_has_a_long_layer_time(ranks: list[dict]) -> None:
    first, second = ranks
    assert all(rank["slow"]["step_s"] > 0.3 for rank in ranks), "both take as long for the step"
    # The 0.3 s are divided by 32 tokens.
    assert second["slow"]["per_token_s"] > 0.3 / 32
    assert first["slow"]["per_token_s"] < 0.1 / 32


def test_recomputation_is_timed(ranks: list[dict]) -> None:
    first, second = ranks
    assert (second["slow"]["calls"], second["recomputed"]["calls"]) == (1, 2)
    assert 0.3 / 32 < second["recomputed"]["per_token_s"] < 0.5 / 32
    assert first["recomputed"]["per_token_s"] < 0.1 / 32


def test_no_collective_is_timed(ranks: list[dict]) -> None:
    assert all(rank["elsewhere"]["step_s"] > 0.2 for rank in ranks)
    assert all(rank["elsewhere"]["per_token_s"] < 0.1 / 32 for rank in ranks), "nobody waits in the layer"
    assert all(rank["evaluated"] != rank["evaluated"] for rank in ranks), "evaluation is not training"


def test_a_layer_that_is_called_by_keyword_is_timed() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    timer = LayerTimer(model, torch.device("cpu"))
    layer(input=torch.zeros(2, 3, 4))
    assert timer.read() > 0


def test_the_timed_layer_is_the_largest_of_the_middle_block() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8 + i)) for i in range(3))
    model = nn.ModuleDict({"blocks": blocks, "few": nn.ModuleList([nn.Linear(99, 99)])})
    assert representative_layer(model) is blocks[1][1]
    assert representative_layer(nn.Linear(4, 4)) is None


def await_that(condition: Any, what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.01)


def watched(device: torch.device, reads_host: bool = False, faults: list[str] | None = None) -> DeviceMonitor:
    on_fault = (faults if faults is not None else []).append
    return DeviceMonitor(device, reads_host, on_fault, interval_s=0.02).start()


def test_the_gpu_of_this_process_is_read(nvml: Nvml) -> None:
    watch = watched(GPU)
    await_that(lambda: watch.latest.gpu_util > 0, "a reading")
    watch.stop()
    read = watch.latest
    assert (read.gpu_index, read.gpu_util, read.gpu_memory, read.gpu_power_w, read.gpu_temp_c) == (5, 0.9, 0.75, 650, 71)
    assert (read.xids, math.isnan(read.last_xid), math.isnan(read.host_cpu_util)) == (0, True, True)
    assert nvml.opened == ["GPU-8f1c"], "by its UUID, independent of CUDA_VISIBLE_DEVICES"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_is_read() -> None:
    held = torch.ones(2**28, dtype=torch.uint8, device=GPU)
    watch = watched(GPU)
    await_that(lambda: watch.latest.gpu_memory > 0, "a reading")
    watch.stop()
    read, (free, total) = watch.latest, torch.cuda.mem_get_info(GPU)
    assert read.gpu_memory == pytest.approx(1 - free / total, abs=0.05)
    assert read.gpu_memory >= held.nbytes / total
    assert read.gpu_index >= 0
    assert 0 <= read.gpu_util <= 1
    assert 5 < read.gpu_power_w < 3000
    assert 5 < read.gpu_temp_c < 110
    assert read.xids == 0


def test_a_gpu_without_a_known_uuid_is_opened_by_its_pci_address(nvml: Nvml) -> None:
    nvml.lacks = {"nvmlDeviceGetHandleByUUID", "nvmlDeviceGetPowerUsage", "nvmlEventSetCreate"}
    watch = watched(GPU)
    await_that(lambda: watch.latest.gpu_util > 0, "a reading")
    watch.stop()
    assert nvml.opened == ["00000000:3B:00.0"]
    assert math.isnan(watch.latest.gpu_power_w), "one missing reading leaves the others"
    assert watch.latest.gpu_temp_c == 71


def test_an_xid_is_reported_at_once_and_counted(nvml: Nvml) -> None:
    nvml.faults = [94, 79]
    faults: list[str] = []
    watch = watched(GPU, faults=faults)
    await_that(lambda: watch.latest.xids == 2, "two faults")
    watch.stop()
    assert watch.latest.last_xid == 79
    assert faults == [
        "Xid 94 on GPU 5: see NVIDIA's catalog of Xid errors",
        "Xid 79 on GPU 5: fallen off the bus",
    ]


def test_clocks_that_the_hardware_keeps_low_are_reported_once(nvml: Nvml) -> None:
    faults: list[str] = []
    # A power limit, and the driver's own thermal limit.
    nvml.gpus[0]["slowdowns"] = 0x4 | 0x20
    watch = watched(GPU, faults=faults)
    await_that(lambda: watch.latest.gpu_util > 0, "a reading")
    time.sleep(0.3)
    assert faults == []
    nvml.gpus[0]["slowdowns"] = 0x8 | 0x80
    await_that(lambda: bool(faults), "the report")
    time.sleep(0.3)
    watch.stop()
    assert faults == ["the clocks of a GPU are lowered (GPU 5): power brake; check the node's cooling and power supply"]


@pytest.mark.parametrize("error", [NVMLError_GpuIsLost, NVMLError_ResetRequired])
def test_a_lost_gpu_is_reported_once(nvml: Nvml, error: type[NVMLError], capsys: pytest.CaptureFixture[str]) -> None:
    faults: list[str] = []
    watch = watched(GPU, faults=faults)
    await_that(lambda: watch.latest.gpu_util > 0, "a reading")
    nvml.lacks, nvml.error = {name for name in dir(Nvml) if name.startswith(("nvmlDeviceGet", "nvmlEventSetWait"))}, error
    await_that(lambda: bool(faults), "the loss")
    assert math.isnan(watch.latest.gpu_util)
    nvml.lacks = {"nvmlDeviceGetPowerUsage"}
    await_that(lambda: watch.latest.gpu_util > 0, "a reading after it")
    watch.stop()
    assert faults == ["a GPU is lost (GPU 5); restart the node, or reset the GPU"]
    assert capsys.readouterr().err == ""


def test_a_gpu_without_readings_is_polled_further_without_output(nvml: Nvml, capsys: pytest.CaptureFixture[str]) -> None:
    watch = watched(GPU)
    await_that(lambda: watch.latest.gpu_util > 0, "a reading")
    nvml.lacks = {name for name in dir(Nvml) if name.startswith(("nvmlDeviceGet", "nvmlEventSetWait"))}
    await_that(lambda: math.isnan(watch.latest.gpu_util), "a reading that fails")
    watch.stop()
    assert capsys.readouterr().err == ""


def test_nothing_is_read_without_library_or_driver(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.lacks = {"nvmlInit"}
    ends_with(watched(GPU), DeviceReadings())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    ends_with(watched(GPU), DeviceReadings())
    ends_with(watched(CPU), DeviceReadings())


def ends_with(watch: DeviceMonitor, sample: DeviceReadings) -> None:
    await_that(lambda: not any(thread.name == "device-monitor" for thread in threading.enumerate()), "the thread to end")
    assert watch.latest == sample


def test_one_rank_of_a_node_reads_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_metrics, "_CPU_S", 0.01)
    watch = watched(CPU, reads_host=True)
    await_that(lambda: watch.latest.host_ram_used > 0, "a reading")
    watch.stop()
    assert 0 <= watch.latest.host_cpu_util <= 1
    memory = psutil.virtual_memory()
    assert watch.latest.host_ram_used == pytest.approx(1 - memory.available / memory.total, abs=0.2)
    assert math.isnan(watch.latest.gpu_util)


EXPECTED = {
    "gpu/util_mean": 0.9,
    "gpu/util_min": 0.9,
    "gpu/temp_max": 71,
    "gpu/power_mean": 650,
    "gpu/memory_max_frac": 0.75,
    "gpu/xids": 1,
    "memory/peak_active_gib": 30,
    "memory/peak_reserved_gib": 40,
    "memory/alloc_retries": 2,
}


def rows_of_eight(num_rows: int) -> Split:
    """Return rows of one document each, with all tokens trained."""
    ends = np.arange(0, 8 * num_rows + 1, 8)
    tokens, trained = np.arange(8 * num_rows, dtype=np.uint32), np.ones(8 * num_rows, dtype=np.uint8)
    columns = {"source": np.zeros(num_rows, np.uint16), "num_trained": np.full(num_rows, 7)}
    return Split(tokens, trained, ends, ends, columns)


def test_what_gpus_measure_and_cost_is_in_wandb(
    plan_of: PlanOf, nvml: Nvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: MEMORY)
    nvml.faults = [79]
    plan = plan_of("tracking=wandb", "tracking.mode=offline", "cluster.price_per_gpu_hour=3", device=H100)
    plan = plan.model_copy(update={"run_dir": str(tmp_path / "run")})
    run = hand_made.run(plan, Attempt(None))
    tracker = start_trackers(plan, run.root, 1, on_stop=lambda: None)
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1, timeout=timedelta(seconds=30))
    monitor = Monitor(plan, RankInfo(0, 0, 1, 1), GPU, nn.Module(), tracker)
    meter = Meter(plan, 40, attempt=1, restart=0, peak_tflops=989.0)
    batches = TrainBatches(rows_of_eight(plan.batch.global_batch_size), plan.batch, 0, 0, plan.topology.world_size, pad_id=0)
    monitor.start_training(0)
    metrics_of_step: dict[str, float] = {}
    end, step = time.monotonic() + 60, 0
    # Background threads read the device and the run's costs.
    while not (metrics_of_step.keys() >= {*EXPECTED, *COST} and metrics_of_step["gpu/xids"]):
        assert time.monotonic() < end, metrics_of_step
        time.sleep(0.05)
        monitor.record_step(TIMES, load_s=0.1)
        monitor.update_ranks(monitor.pack_local())
        step += 1
        metrics = meter.step(step, batches.step(0), 2.0, 1.0, 1e-5, TIMES)
        metrics_of_step = metrics | monitor.metrics(meter.tokens)
        tracker.log(step, metrics_of_step)
    monitor.stop()
    dist.destroy_process_group()
    tracker.finish("completed")
    row = history(run.root)[-1]
    assert metrics_of_step.keys() <= row.keys()
    assert {name: row[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert plan.peak is not None
    assert row["memory/planned_gib"] == pytest.approx(plan.peak.peak_gib - plan.peak.runtime_gib)
    assert row["perf/planned_tokens_per_sec"] == pytest.approx(planned_tokens_per_sec(plan))
    assert row["cost/usd"] == pytest.approx(3 * row["cost/gpu_hours"])
    assert row["cost/usd_per_million_tokens"] == pytest.approx(row["cost/usd"] / row["trainer/tokens"] * 1e6)
    assert 0 < row["perf/mfu"] < 1
