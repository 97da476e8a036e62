"""The functions and errors of a fake pynvml in a child process of launcher.nvml, without pytest."""

from __future__ import annotations

import ctypes
import time
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    pass


class NVMLError_Timeout(NVMLError):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


class NVMLError_ResetRequired(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


class FabricInfo(ctypes.Structure):
    """The fields of pynvml's c_nvmlGpuFabricInfoV_t that the launcher reads."""

    _fields_ = [("status", ctypes.c_uint), ("state", ctypes.c_uint8), ("healthMask", ctypes.c_uint32)]


ERRORS = {
    error.__name__: error
    for error in (
        *(NVMLError, NVMLError_Timeout, NVMLError_GpuIsLost),
        *(NVMLError_ResetRequired, NVMLError_NotSupported, NVMLError_NoPermission),
    )
}


def answers(driver: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of the module `pynvml` for a driver that answers as `driver` says.

    `gpus` are dicts with uuid, name, bus and optionally memory_gib, free_gib, ecc, lanes (in use, at most), slowdowns (bits) and
    fabric (state, status, health mask); one with `error` cannot be reached.
    `processes` are (uuid, pid, MiB or None, name). `init` is `hang` or an error message. `lacks` are unsupported functions.
    """
    if driver.get("init") == "hang":
        time.sleep(60)
    gpus, processes = driver["gpus"], driver["processes"]

    def init() -> None:
        if "init" in driver:
            raise NVMLError(driver["init"])

    def handle_by_index(i: int) -> dict[str, Any]:
        if "error" in gpus[i]:
            raise ERRORS[gpus[i]["error"]]("GPU is lost")
        return gpus[i]

    def handle_by_uuid(uuid: str) -> dict[str, Any]:
        for gpu in gpus:
            if gpu["uuid"] == uuid:
                return gpu
        raise NVMLError("Not Found")

    def ecc_errors(gpu: dict[str, Any], kind: int, counter: int) -> int:
        assert (kind, counter) == (1, 0), "uncorrected, since the last reset"
        if "ecc" not in gpu:
            raise NVMLError_NotSupported("Not Supported")
        return gpu["ecc"]

    def fabric_info(gpu: dict[str, Any], info: Any) -> int:
        if "fabric" not in gpu:
            raise NVMLError_NotSupported("Not Supported")
        info._obj.state, info._obj.status, info._obj.healthMask = gpu["fabric"]
        return 0

    def running(gpu: dict[str, Any]) -> list[SimpleNamespace]:
        of_gpu = [row for row in processes if row[0] == gpu["uuid"]]
        return [SimpleNamespace(pid=pid, usedGpuMemory=mib and mib * 2**20) for _, pid, mib, _ in of_gpu]

    def process_name(pid: int) -> str:
        for _, process, _, name in processes:
            if process == pid and name:
                return name
        raise NVMLError("Not Found")

    def unsupported(*arguments: Any) -> None:
        raise NVMLError_NotSupported("Not Supported")

    functions = {
        "nvmlInit": init,
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": handle_by_index,
        "nvmlDeviceGetHandleByUUID": handle_by_uuid,
        "nvmlDeviceGetUUID": lambda gpu: gpu["uuid"],
        # Older versions of the package return bytes.
        "nvmlDeviceGetName": lambda gpu: gpu["name"].encode(),
        "nvmlDeviceGetPciInfo": lambda gpu: SimpleNamespace(busId=gpu["bus"]),
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(
            total=gpu.get("memory_gib", 80) * 2**30, free=gpu.get("free_gib", 79) * 2**30
        ),
        "nvmlSystemGetDriverVersion": lambda: driver.get("version", "570.86.15").encode(),
        "nvmlSystemGetCudaDriverVersion": lambda: driver.get("cuda", 12080),
        "nvmlDeviceGetTotalEccErrors": ecc_errors,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda gpu: gpu.get("lanes", (16, 16))[0],
        "nvmlDeviceGetMaxPcieLinkWidth": lambda gpu: gpu.get("lanes", (16, 16))[1],
        # An idle GPU.
        "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: gpu.get("slowdowns", 0x1),
        "nvmlDeviceGetGpuFabricInfoV": fabric_info,
        "c_nvmlGpuFabricInfoV_t": FabricInfo,
        "nvmlDeviceGetComputeRunningProcesses": running,
        "nvmlSystemGetProcessName": process_name,
    }
    functions |= dict.fromkeys(driver.get("lacks", ()), unsupported)
    return {**ERRORS, "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1, "NVML_VOLATILE_ECC": 0, **functions}
