"""What is read of a GPU, with NVIDIA's library played: this machine has none."""

from __future__ import annotations

import math
import sys
import threading
import time
from typing import Any

import psutil
import pytest
import torch
from fake_nvml import Nvml
from fake_pynvml import NVMLError, NVMLError_GpuIsLost, NVMLError_ResetRequired

from launcher.train.monitoring import gpu_stats
from launcher.train.monitoring.gpu_stats import Devices, Sample

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def await_that(condition: Any, what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.01)


def watched(device: torch.device, reads_host: bool = False, told: list[str] | None = None) -> Devices:
    words = told if told is not None else []
    return Devices(device, reads_host, words.append, interval_s=0.02).start()


def test_the_gpu_of_this_process_is_read(nvml: Nvml) -> None:
    watch = watched(GPU)
    await_that(lambda: watch.latest.gpu_util > 0, "a reading")
    watch.stop()
    read = watch.latest
    assert (read.gpu_index, read.gpu_util, read.gpu_memory, read.gpu_power_w, read.gpu_temp_c) == (5, 0.9, 0.75, 650, 71)
    assert (read.xids, math.isnan(read.last_xid), math.isnan(read.host_cpu_util)) == (0, True, True)
    assert nvml.handles == ["GPU-8f1c"], "by its identity, whatever CUDA_VISIBLE_DEVICES says"


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


def test_where_it_is_not_known_by_its_uuid_its_place_on_the_bus_counts(nvml: Nvml) -> None:
    nvml.lacks = {"nvmlDeviceGetHandleByUUID", "nvmlDeviceGetPowerUsage", "nvmlEventSetCreate"}
    watch = watched(GPU)
    await_that(lambda: watch.latest.gpu_util > 0, "a reading")
    watch.stop()
    assert nvml.handles == ["00000000:3B:00.0"]
    assert math.isnan(watch.latest.gpu_power_w), "what one reading lacks takes nothing from the others"
    assert watch.latest.gpu_temp_c == 71


def test_a_fault_is_told_at_once_and_counted(nvml: Nvml) -> None:
    nvml.faults = [94, 79]
    told: list[str] = []
    watch = watched(GPU, told=told)
    await_that(lambda: watch.latest.xids == 2, "two faults")
    watch.stop()
    assert watch.latest.last_xid == 79
    assert told == [
        "Xid 94 on GPU 5: a memory error that ended one process alone; reset the GPU when the run is over",
        "Xid 79 on GPU 5: fallen off the bus",
    ]


@pytest.mark.parametrize("error", [NVMLError_GpuIsLost, NVMLError_ResetRequired])
def test_a_gpu_that_is_lost_is_told_once(nvml: Nvml, error: type[NVMLError], capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    watch = watched(GPU, told=told)
    await_that(lambda: watch.latest.gpu_util > 0, "a reading")
    nvml.lacks, nvml.error = {name for name in dir(Nvml) if name.startswith(("nvmlDeviceGet", "nvmlEventSetWait"))}, error
    await_that(lambda: bool(told), "the loss")
    assert math.isnan(watch.latest.gpu_util)
    nvml.lacks = {"nvmlDeviceGetPowerUsage"}
    await_that(lambda: watch.latest.gpu_util > 0, "a reading after it")
    watch.stop()
    assert told == ["a GPU is lost (GPU 5); the node must be restarted, or the GPU reset"]
    assert capsys.readouterr().err == ""


def test_a_gpu_that_tells_nothing_is_asked_on_and_makes_no_noise(nvml: Nvml, capsys: pytest.CaptureFixture[str]) -> None:
    watch = watched(GPU)
    await_that(lambda: watch.latest.gpu_util > 0, "a reading")
    nvml.lacks = {name for name in dir(Nvml) if name.startswith(("nvmlDeviceGet", "nvmlEventSetWait"))}
    await_that(lambda: math.isnan(watch.latest.gpu_util), "a reading that fails")
    watch.stop()
    assert capsys.readouterr().err == ""


def test_without_the_library_or_a_driver_nothing_is_read(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.lacks = {"nvmlInit"}
    ends_with(watched(GPU), Sample())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    ends_with(watched(GPU), Sample())
    ends_with(watched(CPU), Sample())


def ends_with(watch: Devices, sample: Sample) -> None:
    await_that(lambda: not any(thread.name == "devices" for thread in threading.enumerate()), "the thread to end")
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
