"""GPU readings from a fake NVML, because the test machine has no GPU."""

from __future__ import annotations

import math
import sys
import threading
import time
from typing import Any

import psutil
import pytest
import torch
from fake_nvml import Nvml, NVMLError, NVMLError_GpuIsLost, NVMLError_ResetRequired

from launcher.train.monitoring import gpu_stats
from launcher.train.monitoring.gpu_stats import DeviceMonitor, DeviceReadings

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


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
        "Xid 94 on GPU 5: a memory error that ended only one process; reset the GPU when the run is over",
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
    monkeypatch.setattr(gpu_stats, "_CPU_S", 0.01)
    watch = watched(CPU, reads_host=True)
    await_that(lambda: watch.latest.host_ram_used > 0, "a reading")
    watch.stop()
    assert 0 <= watch.latest.host_cpu_util <= 1
    memory = psutil.virtual_memory()
    assert watch.latest.host_ram_used == pytest.approx(1 - memory.available / memory.total, abs=0.2)
    assert math.isnan(watch.latest.gpu_util)
