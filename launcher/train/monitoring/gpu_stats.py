"""What this rank's GPU and its node say of themselves, read in a thread: it never raises, and the training never waits for it."""

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
from launcher.plan import xids

INTERVAL_S = 5.0
_CPU_S = 0.5
_NAN = math.nan


class Sample(NamedTuple):
    """The latest readings, NaN where there is none; fractions are 0 to 1.

    `gpu_index` is the driver's own number, whatever CUDA_VISIBLE_DEVICES says; `xids` counts the faults since the start and
    `last_xid` is the number of the last one. Only one rank of each node reads the host's.
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


class Devices:
    """Keeps `latest` up to date; `on_fault` is told each Xid, and that the GPU is lost, at once, from the thread.

    `device` is the rank's, of which only a GPU of NVIDIA is asked; `reads_host` reads CPU and memory of the node as well.
    """

    def __init__(
        self, device: torch.device, reads_host: bool, on_fault: Callable[[str], None], interval_s: float = INTERVAL_S
    ) -> None:
        self._device, self._reads_host = device, reads_host
        self._on_fault, self._interval_s = on_fault, interval_s
        self._ended = threading.Event()
        self.latest = Sample()

    def start(self) -> Devices:
        threading.Thread(target=self._watch, name="devices", daemon=True).start()
        return self

    def stop(self) -> None:
        """The thread ends within an interval and is not waited for: a driver that hangs must hold up nobody."""
        self._ended.set()

    def _watch(self) -> None:
        try:
            gpu = _open_sensor(self._device) if self._device.type == "cuda" else None
            if gpu is None and not self._reads_host:
                return
            number, is_told = "", False
            while not self._ended.is_set():
                readings = gpu.read() if gpu is not None else {}
                if self._reads_host:
                    readings |= _host()
                self.latest = self.latest._replace(**readings)
                # One that is lost has not even a number any more.
                number = number if math.isnan(self.latest.gpu_index) else f" (GPU {self.latest.gpu_index:.0f})"
                if gpu is not None and gpu.is_lost and not is_told:
                    is_told = True
                    self._on_fault(f"{xids.LOST}{number}; the node must be restarted, or the GPU reset")
                self._wait(gpu)
        except Exception as error:
            # What cannot be read is missing from the charts; that is all.
            print(f"note: this rank's device is not watched any more: {type(error).__name__}: {error}", file=sys.stderr)

    def _wait(self, gpu: GpuSensor | None) -> None:
        """Until the next reading is due; faults of the GPU end the waiting for a moment."""
        until = time.monotonic() + self._interval_s
        while (left := until - time.monotonic()) > 0 and not self._ended.is_set():
            if gpu is None or not gpu.has_events:
                self._ended.wait(left)
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
