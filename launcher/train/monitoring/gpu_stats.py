"""Readings of this rank's GPU and node, taken in a thread that never raises and that training never waits for."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch

from launcher.nvml import GpuSensor
from launcher.train.monitoring import xids

INTERVAL_S = 5.0
_CPU_S = 0.5
# Consecutive readings after which lowered clocks are reported; shorter drops hardly slow training.
_LASTING_READINGS = 6
_NAN = math.nan


class DeviceReadings(NamedTuple):
    """The latest readings; NaN for values that were not read. Fractions are 0 to 1.

    Attributes:
        gpu_index: the driver's number of the GPU, independent of CUDA_VISIBLE_DEVICES.
        xids: number of Xid faults since the start.
        last_xid: code of the last fault.
        host_cpu_util, host_ram_used: of the node; read by one rank per node.
    """

    gpu_index: float = _NAN
    gpu_util: float = _NAN
    gpu_memory: float = _NAN
    gpu_power_w: float = _NAN
    gpu_temp_c: float = _NAN
    xids: float = 0.0
    last_xid: float = _NAN
    host_cpu_util: float = _NAN
    host_ram_used: float = _NAN


class DeviceMonitor:
    """Keeps `latest` up to date; calls `on_fault` from its thread for each Xid, lasting lowered clocks, and a lost GPU.

    `device` is the rank's device; only NVIDIA GPUs are read. With `reads_host`, the node's CPU and memory are read as well.
    """

    def __init__(
        self, device: torch.device, reads_host: bool, on_fault: Callable[[str], None], interval_s: float = INTERVAL_S
    ) -> None:
        self._device, self._reads_host = device, reads_host
        self._on_fault, self._interval_s = on_fault, interval_s
        self._stopped = threading.Event()
        self.latest = DeviceReadings()

    def start(self) -> DeviceMonitor:
        """Start the thread."""
        threading.Thread(target=self._watch, name="device-monitor", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop the thread within an interval, without waiting for it, because the driver may hang."""
        self._stopped.set()

    def _watch(self) -> None:
        try:
            gpu = _open_sensor(self._device) if self._device.type == "cuda" else None
            if gpu is None and not self._reads_host:
                return
            gpu_name, is_reported, num_slow = "", False, 0
            while not self._stopped.is_set():
                readings = gpu.read() if gpu is not None else {}
                if self._reads_host:
                    readings |= _host()
                self.latest = self.latest._replace(**readings)
                # A lost GPU no longer has a number.
                gpu_name = gpu_name if math.isnan(self.latest.gpu_index) else f" (GPU {self.latest.gpu_index:.0f})"
                if gpu is not None and gpu.is_lost and not is_reported:
                    is_reported = True
                    self._on_fault(f"{xids.LOST}{gpu_name}; restart the node, or reset the GPU")
                slowdowns = gpu.read_hardware_slowdowns() if gpu is not None else ()
                num_slow = num_slow + 1 if slowdowns else 0
                if num_slow == _LASTING_READINGS:
                    reasons = " and ".join(slowdowns)
                    self._on_fault(
                        f"the clocks of a GPU are lowered{gpu_name}: {reasons}; check the node's cooling and power supply"
                    )
                self._wait(gpu)
        except Exception as error:
            # Only the charts lose these readings.
            print(f"note: the readings of this rank's device have stopped: {type(error).__name__}: {error}", file=sys.stderr)

    def _wait(self, gpu: GpuSensor | None) -> None:
        """Wait until the next reading is due, reporting GPU faults meanwhile."""
        until = time.monotonic() + self._interval_s
        while (left := until - time.monotonic()) > 0 and not self._stopped.is_set():
            if gpu is None or not gpu.has_events:
                self._stopped.wait(left)
            elif (number := gpu.next_xid(left)) is not None:
                self.latest = self.latest._replace(xids=self.latest.xids + 1, last_xid=float(number))
                self._on_fault(f"Xid {number} on GPU {self.latest.gpu_index:.0f}: {xids.meaning(number)}")


def _open_sensor(device: torch.device) -> GpuSensor | None:
    """Open the GPU that this process computes on; None without NVIDIA's driver."""
    properties = torch.cuda.get_device_properties(device)
    bus_id = f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"
    return GpuSensor.open(f"GPU-{properties.uuid}", bus_id)


def _host() -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {"host_cpu_util": psutil.cpu_percent(interval=_CPU_S) / 100, "host_ram_used": 1 - memory.available / memory.total}
