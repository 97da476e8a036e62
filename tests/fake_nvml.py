"""A fake of pynvml, NVIDIA's management library, for machines without a GPU.

`nvml` installs it in this process. `driver` installs one in the child processes of launcher.nvml: a module `pynvml` on their path
that answers from a file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_pynvml import NVMLError, NVMLError_GpuIsLost, NVMLError_ResetRequired, NVMLError_Timeout

_MODULE = """
import json, sys
sys.path.append({tests!r})
import fake_pynvml

globals().update(fake_pynvml.answers(json.load(open({file!r}))))
"""


class Nvml(ModuleType):
    """The parts of pynvml that the launcher uses; this process's GPU is the driver's number 5. `faults` are Xids to report.

    Functions in `lacks` fail with `error`.
    """

    NVMLError, NVMLError_Timeout = NVMLError, NVMLError_Timeout
    NVMLError_GpuIsLost, NVMLError_ResetRequired = NVMLError_GpuIsLost, NVMLError_ResetRequired
    NVML_TEMPERATURE_GPU, nvmlEventTypeXidCriticalError = 0, 8

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.faults: list[int] = []
        self.handles: list[str] = []
        self.lacks: set[str] = set()
        self.slowdowns = 0
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

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.slowdowns

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 71


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    import torch

    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = SimpleNamespace(uuid="8f1c", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the driver's answers in child processes, with the keys of `fake_pynvml.answers`."""
    folder = tmp_path / "fake_nvml"
    folder.mkdir()
    file = folder / "driver.json"
    (folder / "pynvml.py").write_text(_MODULE.format(tests=str(Path(__file__).parent), file=str(file)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def set_answers(gpus: list[dict[str, Any]], processes: list[Any] = [], **others: Any) -> None:  # noqa: B006
        file.write_text(json.dumps({"gpus": gpus, "processes": processes, **others}))

    return set_answers
