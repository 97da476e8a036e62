"""NVIDIA's management library, through the package nvidia-ml-py: this machine's GPUs, and readings of one GPU.

A faulty driver may never answer, so `list_gpus` asks in a child process with a deadline: this module, run as a script, which
therefore imports nothing from the package. `GpuSensor` asks in the calling thread, which must be one that nothing waits for.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# If the driver is loaded, one of these files exists; the last two belong to WSL and its kernel module.
_DRIVER_FILES = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")
# Bits of NVML's clocks event reasons (nvml.h) that never belong to normal operation.
_DRIVER_SLOWDOWN = 0x20
_SLOWDOWNS = {_DRIVER_SLOWDOWN: "thermal limit of the driver", 0x40: "thermal limit of the hardware", 0x80: "power brake"}
# The hardware limits the clocks, for a reason of its own that older drivers do not report.
_HARDWARE_SLOWDOWN, _OTHER_SLOWDOWN = 0x08, "limit of the hardware"

# Faults after which a GPU does not work, or computes wrongly, until it is reset or replaced, by their Xid numbers
# (slurm/health_prologue.sh has the same list). https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html
BROKEN_XIDS = {
    48: "uncorrectable memory error",
    62: "its controller has halted",
    64: "faulty memory row that could not be remapped",
    74: "NVLink error",
    79: "fallen off the bus",
    95: "uncontained memory error",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "unrecovered memory error",
}
# The text for a GPU that the driver no longer finds, with or without an Xid.
LOST_GPU = "a GPU is lost"


def describe_xid(number: int) -> str:
    return BROKEN_XIDS.get(number, "see NVIDIA's catalog of Xid errors")


class NvmlError(Exception):
    """The driver is unavailable, does not answer, or returns an error."""


@dataclass(frozen=True)
class GpuInfo:
    """One GPU as the driver knows it; None stands for what the driver or the GPU does not report."""

    uuid: str
    name: str
    memory_gib: float | None = None
    free_gib: float | None = None
    # Uncorrected memory errors since the last reset.
    ecc_errors: int | None = None
    # Why the hardware or the driver lowers its clocks; power limits under load are not among the reasons.
    slowdowns: Sequence[str] = ()
    # The processes that compute on it, and the memory in MiB that each uses.
    processes: Sequence[tuple[int, int | None]] = ()


def has_driver() -> bool:
    """Return whether NVIDIA's driver is loaded, or is installed and may load on first use; checks only the file system."""
    return any(Path(file).exists() for file in _DRIVER_FILES) or shutil.which("nvidia-smi") is not None


def list_gpus(deadline_s: float = 20.0) -> list[GpuInfo]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES makes visible to this process, in its order.

    Raises:
        NvmlError: if the driver is missing, fails, does not answer within the deadline, or lacks a named GPU.
    """
    child = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        output, errors = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        # A process that hangs in the driver cannot be killed; waiting for it, as subprocess.run does, would hang too.
        child.kill()
        raise NvmlError(f"the NVIDIA driver did not answer within {deadline_s:g} s") from None
    if child.returncode:
        last = (errors.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise NvmlError(f"the NVIDIA driver cannot be queried: {last}")
    return [GpuInfo(**row) for row in json.loads(output)]


class GpuSensor:
    """Readings and faults of the GPU that this process computes on."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._events: Any = None
        # Whether the driver has lost the GPU, or reports that it needs a reset.
        self.is_lost = False
        try:
            self._events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, self._events)
        except nvml.NVMLError:
            # Unsupported on this type of GPU or in this container.
            self._events = None

    @classmethod
    def open(cls, uuid: str, bus_id: str) -> GpuSensor | None:
        """Open a GPU by its UUID, or else by its PCI address; CUDA numbers GPUs differently. Return None without a driver."""
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError:
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        return cls(pynvml, handle)

    @property
    def has_events(self) -> bool:
        """Whether the driver reports this GPU's faults as they happen."""
        return self._events is not None

    def read(self) -> dict[str, float]:
        """Return the driver's GPU number, utilization and used memory (0 to 1), watts and °C; NaN for missing readings."""
        nvml, handle = self._nvml, self._handle
        return {
            "gpu_index": self._try(lambda: nvml.nvmlDeviceGetIndex(handle), math.nan),
            "gpu_util": self._try(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100, math.nan),
            "gpu_memory": self._try(lambda: (memory := nvml.nvmlDeviceGetMemoryInfo(handle)).used / memory.total, math.nan),
            "gpu_power_w": self._try(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000, math.nan),
            "gpu_temp_c": self._try(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU), math.nan),
        }

    def read_hardware_slowdowns(self) -> tuple[str, ...]:
        """Return why the hardware lowers the GPU's clocks: heat, or the power supply; empty if it does not or if unknown."""
        bits = self._try(lambda: self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle), 0)
        return _name_slowdowns(bits & ~_DRIVER_SLOWDOWN)

    def next_xid(self, within_s: float) -> int | None:
        """Wait for the next fault; return its Xid, or None if there was none in `within_s` seconds."""
        nvml = self._nvml
        try:
            return int(nvml.nvmlEventSetWait_v2(self._events, max(1, int(within_s * 1000))).eventData)
        except nvml.NVMLError_Timeout:
            return None
        except nvml.NVMLError as error:
            # Further waits would fail at once.
            self._events = None
            self.is_lost |= _is_loss(nvml, error)
            return None

    def _try(self, read: Callable[[], Any], missing: Any) -> Any:
        try:
            return read()
        except self._nvml.NVMLError as error:
            self.is_lost |= _is_loss(self._nvml, error)
            return missing


def _is_loss(nvml: Any, error: Exception) -> bool:
    return isinstance(error, nvml.NVMLError_GpuIsLost | nvml.NVMLError_ResetRequired)


def _name_slowdowns(bits: int) -> tuple[str, ...]:
    reasons = tuple(reason for bit, reason in _SLOWDOWNS.items() if bits & bit)
    return reasons or ((_OTHER_SLOWDOWN,) if bits & _HARDWARE_SLOWDOWN else ())


# The code below runs in the child process.


def _list_visible(nvml: Any, visible: str | None) -> list[Any]:
    """Return handles of the GPUs in a value of CUDA_VISIBLE_DEVICES, numbers or UUIDs; raises if one of them is unreachable."""
    reachable: list[Any] = []
    for i in range(nvml.nvmlDeviceGetCount()):
        try:
            reachable.append(nvml.nvmlDeviceGetHandleByIndex(i))
        except nvml.NVMLError_NoPermission:
            # It belongs to another job: CUDA does not count it either.
            continue
        except nvml.NVMLError as error:
            reachable.append(error)
    chosen: list[Any] = []
    names = map(str, range(len(reachable))) if visible is None else visible.split(",")
    for number in map(str.strip, names):
        # CUDA ignores what follows an empty or negative entry.
        if number in ("", "-1"):
            break
        if not number.isdigit():
            chosen.append(nvml.nvmlDeviceGetHandleByUUID(number))
        elif int(number) < len(reachable):
            chosen.append(reachable[int(number)])
        else:
            sys.exit(f"there is no GPU {number} among the {len(reachable)} of this node (CUDA_VISIBLE_DEVICES={visible})")
    for handle in chosen:
        if isinstance(handle, nvml.NVMLError):
            raise handle
    return chosen


def _read_gpu(nvml: Any, handle: Any) -> GpuInfo:
    def read(function: str, *arguments: Any) -> Any:
        """Return a reading, or None if this GPU, driver or container does not support it; a lost GPU raises."""
        try:
            return getattr(nvml, function)(handle, *arguments)
        except nvml.NVMLError as error:
            if _is_loss(nvml, error):
                raise
            return None

    memory = read("nvmlDeviceGetMemoryInfo")
    return GpuInfo(
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        memory_gib=None if memory is None else memory.total / 2**30,
        free_gib=None if memory is None else memory.free / 2**30,
        ecc_errors=read("nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        slowdowns=_name_slowdowns(read("nvmlDeviceGetCurrentClocksEventReasons") or 0),
        processes=tuple(
            (process.pid, None if process.usedGpuMemory is None else process.usedGpuMemory // 2**20)
            for process in read("nvmlDeviceGetComputeRunningProcesses") or ()
        ),
    )


if __name__ == "__main__":
    import pynvml

    try:
        pynvml.nvmlInit()
        found = [_read_gpu(pynvml, handle) for handle in _list_visible(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))]
    except pynvml.NVMLError as error:
        sys.exit(str(error))
    print(json.dumps([asdict(gpu) for gpu in found]))
