"""A fake of pynvml, NVIDIA's management library, for machines without a GPU.

`nvml` installs it in this process, with one GPU that is the driver's number 5. `driver` installs it in the child processes of
launcher.nvml: a module `pynvml` on their path that answers from a file.
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

H100 = {"uuid": "GPU-aaaa", "name": "NVIDIA H100 80GB HBM3", "bus": "00000000:3B:00.0"}
OTHER = {**H100, "uuid": "GPU-bbbb", "bus": "00000000:AF:00.0"}
_MODULE = (
    "import json, sys\nsys.path.append({!r})\nfrom fake_nvml import Nvml\nsys.modules['pynvml'] = Nvml(**json.load(open({!r})))"
)


class NVMLError(Exception):
    pass


class NVMLError_Timeout(NVMLError):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


class NVMLError_ResetRequired(NVMLError):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


class Nvml(ModuleType):
    """The parts of pynvml that the launcher uses.

    `gpus` are dicts with uuid, name, bus and optionally memory_gib, free_gib, ecc, slowdowns (bits) and processes (pid, MiB or
    None); one with `error` cannot be reached. Functions in `lacks` fail with `error`. `init` is `hang` or an error message.
    `faults` are Xids to report.
    """

    NVMLError, NVMLError_Timeout, NVMLError_NoPermission = NVMLError, NVMLError_Timeout, NVMLError_NoPermission
    NVMLError_GpuIsLost, NVMLError_ResetRequired = NVMLError_GpuIsLost, NVMLError_ResetRequired
    NVML_TEMPERATURE_GPU, nvmlEventTypeXidCriticalError = 0, 8
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0

    def __init__(self, gpus: list[dict[str, Any]], lacks: tuple[str, ...] = (), init: str = "") -> None:
        super().__init__("pynvml")
        self.gpus, self.lacks, self.init = gpus, {*lacks}, init
        self.error: type[NVMLError] = NVMLError
        self.faults: list[int] = []
        self.opened: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in ModuleType.__getattribute__(self, "lacks"):
            raise ModuleType.__getattribute__(self, "error")(f"{name} is not supported")
        return ModuleType.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        if self.init == "hang":
            time.sleep(60)
        if self.init:
            raise NVMLError(self.init)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, i: int) -> dict[str, Any]:
        if "error" in self.gpus[i]:
            raise getattr(self, self.gpus[i]["error"])("GPU is lost")
        return self.gpus[i]

    def _find(self, key: str, value: str) -> dict[str, Any]:
        self.opened.append(value)
        for gpu in self.gpus:
            if gpu.get(key) == value:
                return gpu
        raise NVMLError("Not Found")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:
        return self._find("uuid", uuid)

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> dict[str, Any]:
        return self._find("bus", bus)

    def nvmlDeviceGetUUID(self, gpu: dict[str, Any]) -> str:
        return gpu["uuid"]

    def nvmlDeviceGetName(self, gpu: dict[str, Any]) -> str:
        return gpu["name"]

    def nvmlDeviceGetMemoryInfo(self, gpu: dict[str, Any]) -> SimpleNamespace:
        total, free = gpu.get("memory_gib", 80) * 2**30, gpu.get("free_gib", 79) * 2**30
        return SimpleNamespace(total=total, free=free, used=total - free)

    def nvmlDeviceGetTotalEccErrors(self, gpu: dict[str, Any], kind: int, counter: int) -> int:
        assert (kind, counter) == (1, 0), "uncorrected, since the last reset"
        return gpu.get("ecc", 0)

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: dict[str, Any]) -> int:
        # An idle GPU.
        return gpu.get("slowdowns", 0x1)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: dict[str, Any]) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=mib and mib * 2**20) for pid, mib in gpu.get("processes", ())]

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlDeviceRegisterEvents(self, gpu: dict[str, Any], kinds: int, events: str) -> None:
        assert kinds == self.nvmlEventTypeXidCriticalError

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> SimpleNamespace:
        if self.faults:
            return SimpleNamespace(eventData=self.faults.pop(0))
        time.sleep(timeout_ms / 1000)
        raise NVMLError_Timeout

    def nvmlDeviceGetIndex(self, gpu: dict[str, Any]) -> int:
        return 5

    def nvmlDeviceGetUtilizationRates(self, gpu: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(gpu=90, memory=10)

    def nvmlDeviceGetPowerUsage(self, gpu: dict[str, Any]) -> int:
        return 650_000

    def nvmlDeviceGetTemperature(self, gpu: dict[str, Any], sensor: int) -> int:
        return 71


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    import torch

    fake = Nvml([{**H100, "uuid": "GPU-8f1c", "free_gib": 20}])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = SimpleNamespace(uuid="8f1c", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the driver's answers in child processes, with the arguments of `Nvml`, on a machine that has a driver."""
    folder = tmp_path / "fake_nvml"
    folder.mkdir()
    file = folder / "driver.json"
    (folder / "pynvml.py").write_text(_MODULE.format(str(Path(__file__).parent), str(file)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("launcher.nvml.has_driver", lambda: True)

    def set_answers(*gpus: dict[str, Any], **others: Any) -> None:
        file.write_text(json.dumps({"gpus": gpus, **others}))

    return set_answers
