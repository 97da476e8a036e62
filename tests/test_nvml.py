"""launcher.nvml lists GPUs and processes in a child process; the driver is fake."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from fake_nvml import driver

from launcher import hardware, nvml
from launcher.nvml import GpuInfo, GpuProcess, NvmlError

__all__ = ["driver"]

H100 = "NVIDIA H100 80GB HBM3"
FIRST = {"uuid": "GPU-aaaa", "name": H100, "bus": "00000000:3B:00.0", "memory_gib": 80, "ecc": 0}
SECOND = {"uuid": "GPU-bbbb", "name": H100, "bus": "00000000:AF:00.0", "memory_gib": 79}
Driver = Callable[..., None]


def uuids() -> list[str]:
    return [gpu.uuid for gpu in nvml.list_gpus()]


def test_a_driver_that_loads_on_its_first_use_is_found_by_its_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_DRIVER_FILES", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not nvml.has_driver()
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert nvml.has_driver()


def test_gpus_are_listed_with_what_the_driver_supports(driver: Driver) -> None:
    driver([FIRST, SECOND])
    lanes = {"pcie_lanes": 16, "most_pcie_lanes": 16}
    first = GpuInfo("GPU-aaaa", H100, "0000:3b:00", memory_gib=80.0, ecc_errors=0, free_gib=79.0, **lanes)
    second = GpuInfo("GPU-bbbb", H100, "0000:af:00", memory_gib=79.0, ecc_errors=None, free_gib=79.0, **lanes)
    assert nvml.list_gpus() == [first, second]
    lacks = ("MemoryInfo", "TotalEccErrors", "CurrPcieLinkWidth", "MaxPcieLinkWidth", "CurrentClocksEventReasons")
    driver([{**FIRST, "fabric": (3, 0, 2)}], lacks=[f"nvmlDeviceGet{name}" for name in (*lacks, "GpuFabricInfoV")])
    assert nvml.list_gpus() == [GpuInfo("GPU-aaaa", H100, "0000:3b:00")]


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ({"lanes": (8, 16)}, {"pcie_lanes": 8}),
        # Idle, a power limit, and clocks that a person has set are normal.
        ({"slowdowns": 0x1 | 0x2 | 0x4}, {}),
        ({"slowdowns": 0x8 | 0x40}, {"slowdowns": ("thermal limit of the hardware",)}),
        ({"slowdowns": 0x20 | 0x80}, {"slowdowns": ("thermal limit of the driver", "power brake")}),
        ({"slowdowns": 0x8}, {"slowdowns": ("limit of the hardware",)}),
        ({"fabric": (0, 0, 0)}, {}),
        ({"fabric": (2, 0, 0)}, {"fabric": nvml.FABRIC_STARTING}),
        ({"fabric": (3, 0, 0b10)}, {"fabric": nvml.FABRIC_READY}),
        ({"fabric": (3, 999, 0)}, {"fabric": nvml.FABRIC_FAILED}),
        ({"fabric": (3, 0, 0b1001)}, {"fabric": nvml.FABRIC_READY, "is_fabric_degraded": True}),
    ],
)
def test_links_and_clocks_are_those_that_the_driver_reports(
    driver: Driver, readings: dict[str, object], expected: dict[str, object]
) -> None:
    driver([{**FIRST, **readings}])
    (gpu,) = nvml.list_gpus()
    normal = {"pcie_lanes": 16, "most_pcie_lanes": 16, "slowdowns": (), "fabric": None, "is_fabric_degraded": False}
    assert {name: getattr(gpu, name) for name in normal} == {**normal, **expected}


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("1,0", ["GPU-bbbb", "GPU-aaaa"]), ("GPU-bbbb", ["GPU-bbbb"]), ("GPU-aa", ["GPU-aaaa"])],
)
def test_cuda_visible_devices_chooses_gpus_by_number_or_uuid(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]
) -> None:
    driver([FIRST, SECOND])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert uuids() == expected


def test_a_gpu_that_is_not_there_and_an_empty_choice_are_errors(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver([FIRST])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    with pytest.raises(NvmlError, match=r"there is no GPU 3 among the 1 of this node \(CUDA_VISIBLE_DEVICES=0,3\)"):
        nvml.list_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(NvmlError, match="CUDA_VISIBLE_DEVICES is empty"):
        nvml.list_gpus()


def test_gpus_of_other_jobs_do_not_count_and_a_lost_one_only_where_it_is_chosen(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver([{"error": "NVMLError_NoPermission"}, SECOND, {"error": "NVMLError_GpuIsLost"}])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert uuids() == ["GPU-bbbb"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(NvmlError, match="cannot be queried: GPU is lost"):
        nvml.list_gpus()


def test_a_driver_that_hangs_holds_up_the_caller_until_the_deadline(driver: Driver) -> None:
    driver([], init="hang")
    started = time.monotonic()
    with pytest.raises(NvmlError, match=r"did not answer within 0\.5 s"):
        nvml.list_gpus(deadline_s=0.5)
    assert time.monotonic() - started < 20


def test_processes_are_listed_with_what_the_driver_knows(driver: Driver) -> None:
    driver([FIRST], processes=[("GPU-aaaa", 7, 500, "python"), ("GPU-aaaa", 8, None, "")])
    assert nvml.list_processes() == [GpuProcess("GPU-aaaa", 7, 500, "python"), GpuProcess("GPU-aaaa", 8, None, "")]
    driver([FIRST], lacks=["nvmlDeviceGetComputeRunningProcesses"])
    assert nvml.list_processes() == []


def test_the_device_facts_are_those_of_the_gpus_or_of_the_cpu(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    device = hardware.device.__wrapped__
    monkeypatch.setattr(nvml, "has_driver", lambda: True)
    driver([FIRST, SECOND])
    facts = device()
    assert (facts.kind, facts.name, facts.count, facts.memory_gib) == ("cuda", H100, 2, 80.0)
    driver([], init="Driver Not Loaded")
    facts = device()
    assert (facts.kind, facts.problem) == ("cpu", "the NVIDIA driver cannot be queried: Driver Not Loaded")
    for chosen in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert (device().kind, device().problem) == ("cpu", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(nvml, "has_driver", lambda: False)
    driver([FIRST])
    assert device().kind == "cpu", "no child process is started without a driver"


def test_a_driver_that_cannot_be_asked_is_a_note_of_the_plan(
    driver: Driver, launch_here: Callable[..., CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "has_driver", lambda: True)
    driver([], init="Driver/library version mismatch")
    problem = "the NVIDIA driver cannot be queried: Driver/library version mismatch"
    shown = launch_here("plan", "model=tiny", PYTHONPATH=os.environ["PYTHONPATH"], COLUMNS="200")
    assert f"note       no GPU is used: {problem}; look at it with nvidia-smi\n" in shown.stdout
    settings = ("model=tiny", "tracking=none", "cluster.gpu_type=h100", "cluster.ranks_per_node=2", "run.name=on-gpus")
    refused = launch_here("train", *settings, PYTHONPATH=os.environ["PYTHONPATH"])
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"the plan asks for 2 GPUs and this machine has none ({problem})\n")


def test_the_driver_says_its_versions(driver: Driver) -> None:
    driver([FIRST], version="570.86.15", cuda=12080)
    assert nvml.read_driver() == nvml.DriverInfo("570.86.15", "12.8")
    driver([FIRST], lacks=["nvmlSystemGetCudaDriverVersion"])
    assert nvml.read_driver().cuda == ""
