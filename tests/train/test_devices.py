"""What is read of a GPU, with NVIDIA's library played: this machine has none."""

from __future__ import annotations

import math
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from launcher.train import devices
from launcher.train.devices import Devices, Sample

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class NVMLError(Exception):
    pass


class NVMLError_Timeout(NVMLError):
    pass


class Nvml(ModuleType):
    """pynvml as far as it is used; the GPU of this process is the driver's number 5. `faults` are Xids still to come."""

    NVMLError, NVMLError_Timeout = NVMLError, NVMLError_Timeout
    NVML_TEMPERATURE_GPU, nvmlEventTypeXidCriticalError = 0, 8

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.faults: list[int] = []
        self.handles: list[str] = []
        self.lacks: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in ModuleType.__getattribute__(self, "lacks"):
            raise NVMLError(f"{name} is not supported")
        return ModuleType.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.handles.append(uuid)
        return uuid

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> str:
        self.handles.append(bus)
        return bus

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlDeviceRegisterEvents(self, handle: str, kinds: int, events: str) -> None:
        assert kinds == self.nvmlEventTypeXidCriticalError

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> SimpleNamespace:
        if self.faults:
            return SimpleNamespace(eventData=self.faults.pop(0))
        time.sleep(timeout_ms / 1000)
        raise NVMLError_Timeout

    def nvmlDeviceGetIndex(self, handle: str) -> int:
        return 5

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=90, memory=10)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=60, total=80)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 650_000

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 71


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    played = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", played)
    found = SimpleNamespace(uuid="8f1c", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    return played


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


def test_a_gpu_that_is_lost_is_asked_on_and_makes_no_noise(nvml: Nvml, capsys: pytest.CaptureFixture[str]) -> None:
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
    monkeypatch.setattr(devices, "_CPU_S", 0.01)
    watch = watched(CPU, reads_host=True)
    await_that(lambda: watch.latest.host_ram_used > 0, "a reading")
    watch.stop()
    assert 0 <= watch.latest.host_cpu_util <= 1
    memory = psutil.virtual_memory()
    assert watch.latest.host_ram_used == pytest.approx(1 - memory.available / memory.total, abs=0.2)
    assert math.isnan(watch.latest.gpu_util)
