"""NVIDIA's management library (NVML): this machine's GPUs, their processes, and readings of one GPU.

This is the only module that uses it. A faulty driver may never answer, so `list_gpus`, `list_processes` and `read_driver` ask in
a child process with a deadline. `GpuSensor` asks in the calling thread, which must be one that nothing waits for.

Run as a script, this module is that child: `python nvml.py gpus|processes|driver` prints JSON. It therefore imports nothing from
the package.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DEADLINE_S = 20.0
# If the driver is loaded, one of these files exists; the last two belong to WSL and its kernel module.
_DRIVER_FILES = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")
_NAN = math.nan
# Bits of NVML's clocks event reasons (nvml.h) that never belong to normal operation.
_DRIVER_SLOWDOWN = 0x20
_SLOWDOWNS = {_DRIVER_SLOWDOWN: "thermal limit of the driver", 0x40: "thermal limit of the hardware", 0x80: "power brake"}
# The hardware limits the clocks, for a reason of its own that older drivers do not report.
_HARDWARE_SLOWDOWN, _OTHER_SLOWDOWN = 0x08, "limit of the hardware"
# NVML's states of an NVLink fabric. A fabric that has completed its start with an error counts as failed.
FABRIC_STARTING, FABRIC_READY, FABRIC_FAILED = 2, 3, -1
FABRIC_STATES = {1: "not started", FABRIC_STARTING: "still starting", FABRIC_READY: "ready", FABRIC_FAILED: "failed"}


class NvmlError(Exception):
    """The driver is unavailable, does not answer, or returns an error."""


@dataclass(frozen=True)
class GpuInfo:
    """One GPU as the driver knows it.

    Attributes:
        uuid: identity, `GPU-...`.
        bus_id: PCI address as the kernel log writes it, `0000:3b:00`.
        memory_gib: installed memory; None if the driver does not report it.
        free_gib: memory that no process holds; None if the driver does not report it.
        ecc_errors: uncorrected memory errors since the last reset; None on GPUs without ECC.
        pcie_lanes, most_pcie_lanes: lanes that its PCIe link uses, and that GPU and slot both have; None if not reported.
        slowdowns: why the hardware or the driver lowers its clocks; power limits under load are not among the reasons.
        fabric: state of its NVLink fabric, a key of FABRIC_STATES; None without NVSwitches, or if the driver is too old.
        is_fabric_degraded: whether the fabric has less bandwidth than it should.
    """

    uuid: str
    name: str
    bus_id: str
    memory_gib: float | None = None
    ecc_errors: int | None = None
    free_gib: float | None = None
    pcie_lanes: int | None = None
    most_pcie_lanes: int | None = None
    slowdowns: tuple[str, ...] = ()
    fabric: int | None = None
    is_fabric_degraded: bool = False


@dataclass(frozen=True)
class DriverInfo:
    """The versions of the driver and of the newest CUDA that it supports, such as 570.86 and 12.8; empty if not reported."""

    version: str
    cuda: str


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU. `used_mib` is None and `name` is empty if the driver does not report them."""

    gpu_uuid: str
    pid: int
    used_mib: int | None
    name: str


def has_driver() -> bool:
    """Return whether NVIDIA's driver is loaded, or is installed and may load on first use; checks only the file system."""
    return any(Path(file).exists() for file in _DRIVER_FILES) or shutil.which("nvidia-smi") is not None


def list_gpus(deadline_s: float = DEADLINE_S) -> list[GpuInfo]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES makes visible to this process, in its order.

    Raises:
        NvmlError: if the driver is missing, fails, does not answer within the deadline, or lacks a named GPU.
    """
    return [GpuInfo(**{**row, "slowdowns": tuple(row["slowdowns"])}) for row in _ask("gpus", deadline_s)]


def list_processes(deadline_s: float = DEADLINE_S) -> list[GpuProcess]:
    """Return the processes that compute on those GPUs.

    Raises:
        NvmlError: as `list_gpus`.
    """
    return [GpuProcess(**row) for row in _ask("processes", deadline_s)]


def read_driver(deadline_s: float = DEADLINE_S) -> DriverInfo:
    """Return the driver's versions.

    Raises:
        NvmlError: as `list_gpus`.
    """
    (row,) = _ask("driver", deadline_s)
    return DriverInfo(**row)


def _ask(query: str, deadline_s: float) -> list[dict[str, Any]]:
    """Return the rows that the child process prints."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        raise NvmlError("CUDA_VISIBLE_DEVICES is empty")
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, query],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        output, errors = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        # A process that hangs in the driver cannot be killed; waiting for it, as subprocess.run does, would hang too.
        process.kill()
        raise NvmlError(f"the NVIDIA driver did not answer within {deadline_s:g} s") from None
    if process.returncode:
        (last,) = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise NvmlError(f"the NVIDIA driver cannot be queried: {last}")
    rows: list[dict[str, Any]] = json.loads(output)
    return rows


class GpuSensor:
    """Readings and faults of the GPU that this process computes on.

    Attributes:
        is_lost: whether the driver has lost the GPU, or reports that it needs a reset.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._events: Any = None
        self.is_lost = False
        try:
            self._events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, self._events)
        except nvml.NVMLError:
            # Unsupported on this type of GPU or in this container.
            self._events = None

    @classmethod
    def open(cls, uuid: str, bus_id: str) -> GpuSensor | None:
        """Open a GPU by its UUID, or else by its PCI address: CUDA's numbering differs from the driver's.

        Returns:
            The sensor, or None if there is no driver.
        """
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

        def used_memory() -> float:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            return float(memory.used / memory.total)

        readers: dict[str, Callable[[], float]] = {
            "gpu_index": lambda: float(nvml.nvmlDeviceGetIndex(handle)),
            "gpu_util": lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            "gpu_memory": used_memory,
            "gpu_power_w": lambda: float(nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            "gpu_temp_c": lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        }
        return {name: self._read_or_nan(reader) for name, reader in readers.items()}

    def read_hardware_slowdowns(self) -> tuple[str, ...]:
        """Return why the hardware lowers the GPU's clocks: heat, or the power supply; empty if it does not or if unknown."""
        try:
            bits = self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
        except self._nvml.NVMLError as error:
            self._note_loss(error)
            return ()
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
            self._note_loss(error)
            return None

    def _read_or_nan(self, reader: Callable[[], float]) -> float:
        try:
            return reader()
        except self._nvml.NVMLError as error:
            self._note_loss(error)
            return _NAN

    def _note_loss(self, error: Exception) -> None:
        self.is_lost |= isinstance(error, self._nvml.NVMLError_GpuIsLost | self._nvml.NVMLError_ResetRequired)


# The code below runs in the child process.


def _main(query: str) -> None:
    import pynvml

    try:
        pynvml.nvmlInit()
        rows: list[Any]
        if query == "driver":
            rows = [_read_driver(pynvml)]
        else:
            handles = _visible_handles(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
            rows = [_read_gpu(pynvml, handle) for handle in handles] if query == "gpus" else _read_processes(pynvml, handles)
    except pynvml.NVMLError as error:
        sys.exit(str(error))
    print(json.dumps([asdict(row) for row in rows]))


def _visible_handles(nvml: Any, visible: str | None) -> list[Any]:
    """Return handles of the GPUs in a value of CUDA_VISIBLE_DEVICES: numbers, or UUIDs that may be abbreviated.

    Raises:
        NVMLError: if one of them is unreachable; problems with other GPUs do not matter.
    """
    reachable = _all_handles(nvml)
    if visible is None:
        chosen = reachable
    else:
        names = [name.strip() for name in visible.split(",")]
        chosen = [_handle_of(nvml, name, reachable) for name in names]
        if None in chosen:
            missing = names[chosen.index(None)]
            sys.exit(f"there is no GPU {missing} among the {len(reachable)} of this node (CUDA_VISIBLE_DEVICES={visible})")
    for handle in chosen:
        if isinstance(handle, nvml.NVMLError):
            raise handle
    return chosen


def _all_handles(nvml: Any) -> list[Any]:
    """Return the handle of each GPU that this job may use, or the error for an unreachable GPU."""
    handles: list[Any] = []
    for i in range(nvml.nvmlDeviceGetCount()):
        try:
            handles.append(nvml.nvmlDeviceGetHandleByIndex(i))
        except nvml.NVMLError_NoPermission:
            # It belongs to another job: CUDA does not count it either.
            continue
        except nvml.NVMLError as error:
            handles.append(error)
    return handles


def _handle_of(nvml: Any, name: str, handles: list[Any]) -> Any:
    """Return the handle for one entry in CUDA_VISIBLE_DEVICES, or None if there is no such GPU."""
    if name.isdigit():
        return handles[int(name)] if int(name) < len(handles) else None
    try:
        return nvml.nvmlDeviceGetHandleByUUID(name)
    except nvml.NVMLError:
        known = (handle for handle in handles if not isinstance(handle, nvml.NVMLError))
        return next((h for h in known if name.startswith("GPU-") and _text(nvml.nvmlDeviceGetUUID(h)).startswith(name)), None)


def _read_gpu(nvml: Any, handle: Any) -> GpuInfo:
    kinds = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    pci, memory = _or_none(nvml, nvml.nvmlDeviceGetPciInfo, handle), _or_none(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    fabric, is_degraded = _read_fabric(nvml, handle)
    return GpuInfo(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        bus_id="" if pci is None else _kernel_bus_id(_text(pci.busId)),
        memory_gib=None if memory is None else memory.total / 2**30,
        ecc_errors=_or_none(nvml, nvml.nvmlDeviceGetTotalEccErrors, handle, *kinds),
        free_gib=None if memory is None else memory.free / 2**30,
        pcie_lanes=_or_none(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        most_pcie_lanes=_or_none(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        slowdowns=_read_slowdowns(nvml, handle),
        fabric=fabric,
        is_fabric_degraded=is_degraded,
    )


def _read_slowdowns(nvml: Any, handle: Any) -> tuple[str, ...]:
    return _name_slowdowns(_or_none(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle) or 0)


def _name_slowdowns(bits: int) -> tuple[str, ...]:
    reasons = tuple(reason for bit, reason in _SLOWDOWNS.items() if bits & bit)
    return reasons or ((_OTHER_SLOWDOWN,) if bits & _HARDWARE_SLOWDOWN else ())


def _read_fabric(nvml: Any, handle: Any) -> tuple[int | None, bool]:
    """Return the state of a GPU's NVLink fabric, None if it has none, and whether the fabric's bandwidth is degraded."""
    info = nvml.c_nvmlGpuFabricInfoV_t()
    if _or_none(nvml, nvml.nvmlDeviceGetGpuFabricInfoV, handle, ctypes.byref(info)) is None or info.state not in FABRIC_STATES:
        return None, False
    state = FABRIC_FAILED if info.state == FABRIC_READY and info.status else info.state
    # The two lowest bits: 0 if the driver does not know, 1 if degraded, 2 if not (nvml.h).
    return state, info.healthMask & 0b11 == 1


def _read_driver(nvml: Any) -> DriverInfo:
    version, cuda = _or_none(nvml, nvml.nvmlSystemGetDriverVersion), _or_none(nvml, nvml.nvmlSystemGetCudaDriverVersion)
    # CUDA writes 12.8 as 12080.
    return DriverInfo(_text(version or ""), "" if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}")


def _read_processes(nvml: Any, handles: list[Any]) -> list[GpuProcess]:
    processes = []
    for handle in handles:
        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        try:
            running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except nvml.NVMLError_NotSupported:
            continue
        for process in running:
            used_mib = None if process.usedGpuMemory is None else process.usedGpuMemory // 2**20
            try:
                name = _text(nvml.nvmlSystemGetProcessName(process.pid))
            except nvml.NVMLError:
                # It has ended, or belongs to another container.
                name = ""
            processes.append(GpuProcess(uuid, process.pid, used_mib, name))
    return processes


def _or_none(nvml: Any, reader: Callable[..., Any], *arguments: Any) -> Any:
    """Return a reading, or None if this GPU, driver or container does not support it.

    Raises:
        NVMLError: if the driver has lost the GPU.
    """
    try:
        return reader(*arguments)
    except nvml.NVMLError as error:
        if isinstance(error, nvml.NVMLError_GpuIsLost | nvml.NVMLError_ResetRequired):
            raise
        return None


def _kernel_bus_id(bus_id: str) -> str:
    """Return `00000000:3B:00.0` as the kernel log writes it: `0000:3b:00`."""
    return bus_id.lower().partition(".")[0][-len("0000:3b:00") :]


def _text(value: str | bytes) -> str:
    # Older versions of the package return bytes.
    return value.decode(errors="replace") if isinstance(value, bytes) else value


if __name__ == "__main__":
    _main(sys.argv[1])
