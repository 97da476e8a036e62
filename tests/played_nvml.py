"""NVIDIA's management library, played: this machine has no GPU."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


class NVMLError(Exception):
    pass


class NVMLError_Timeout(NVMLError):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


class NVMLError_ResetRequired(NVMLError):
    pass


class Nvml(ModuleType):
    """pynvml as far as it is used; the GPU of this process is the driver's number 5. `faults` are Xids still to come.

    What it `lacks` fails with `error`.
    """

    NVMLError, NVMLError_Timeout = NVMLError, NVMLError_Timeout
    NVMLError_GpuIsLost, NVMLError_ResetRequired = NVMLError_GpuIsLost, NVMLError_ResetRequired
    NVML_TEMPERATURE_GPU, nvmlEventTypeXidCriticalError = 0, 8

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.faults: list[int] = []
        self.handles: list[str] = []
        self.lacks: set[str] = set()
        self.error: type[NVMLError] = NVMLError

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in ModuleType.__getattribute__(self, "lacks"):
            raise ModuleType.__getattribute__(self, "error")(f"{name} is not supported")
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
