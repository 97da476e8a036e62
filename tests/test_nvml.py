"""launcher.nvml lists GPUs and their processes in a child process; the driver is fake."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_nvml import H100, OTHER, driver
from forked import Launch

from launcher import hardware, nvml
from launcher.nvml import GpuInfo, NvmlError

pytestmark = pytest.mark.rest

__all__ = ["driver"]

Driver = Callable[..., None]
HEALTHY = GpuInfo("GPU-aaaa", H100["name"], 80.0, 79.0, 0, [], [])


def test_a_driver_that_loads_on_its_first_use_is_found_by_its_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_DRIVER_FILES", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not nvml.has_driver()
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert nvml.has_driver()


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ({"ecc": 3}, {"ecc_errors": 3}),
        # Idle, a power limit, and clocks that a person has set are normal.
        ({"slowdowns": 0x1 | 0x2 | 0x4}, {}),
        ({"slowdowns": 0x20 | 0x80}, {"slowdowns": ["thermal limit of the driver", "power brake"]}),
        ({"slowdowns": 0x8}, {"slowdowns": ["limit of the hardware"]}),
        (
            {"processes": [(7, 500), (8, None)]},
            {"processes": [[7, 500], [8, None]]},
        ),
    ],
)
def test_a_gpu_is_described_as_the_driver_reports_it(
    driver: Driver, readings: dict[str, object], expected: dict[str, object]
) -> None:
    driver({**H100, **readings})
    assert nvml.list_gpus() == [replace(HEALTHY, **expected)]


def test_readings_that_a_driver_lacks_are_missing(driver: Driver) -> None:
    names = ("MemoryInfo", "TotalEccErrors", "CurrentClocksEventReasons")
    driver(H100, lacks=[f"nvmlDeviceGet{name}" for name in (*names, "ComputeRunningProcesses")])
    assert nvml.list_gpus() == [GpuInfo("GPU-aaaa", H100["name"], slowdowns=[], processes=[])]


def test_cuda_visible_devices_chooses_gpus_by_number_or_uuid(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(H100, OTHER)
    for visible, expected in (("1,0", ["GPU-bbbb", "GPU-aaaa"]), ("GPU-bbbb", ["GPU-bbbb"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu.uuid for gpu in nvml.list_gpus()] == expected
    for missing in ("0,3", "GPU-cccc"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", missing)
        with pytest.raises(NvmlError):
            nvml.list_gpus()


def test_gpus_of_other_jobs_do_not_count_and_a_lost_one_only_where_it_is_chosen(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver({"error": "NVMLError_NoPermission"}, OTHER, {"error": "NVMLError_GpuIsLost"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [gpu.uuid for gpu in nvml.list_gpus()] == ["GPU-bbbb"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(NvmlError, match="GPU is lost"):
        nvml.list_gpus()


def test_a_driver_that_hangs_holds_up_the_caller_until_the_deadline(driver: Driver) -> None:
    driver(init="hang")
    started = time.monotonic()
    with pytest.raises(NvmlError, match="did not answer"):
        nvml.list_gpus(deadline_s=0.5)
    assert time.monotonic() - started < 20


def test_the_device_facts_are_those_of_the_gpus_or_of_the_cpu(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    device = hardware.device.__wrapped__
    driver(H100, OTHER)
    facts = device()
    assert (facts.kind, facts.name, facts.count, facts.memory_gib) == ("cuda", H100["name"], 2, 80.0)
    for chosen in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert (device().kind, device().problem) == ("cpu", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(nvml, "has_driver", lambda: False)
    assert device().kind == "cpu", "no child process is started without a driver"


def test_a_driver_that_cannot_be_asked_is_a_note_of_the_plan(driver: Driver, launch_here: Launch) -> None:
    driver(init="Driver/library version mismatch")
    shown = launch_here("plan", "model=tiny", PYTHONPATH=os.environ["PYTHONPATH"], COLUMNS="200")
    assert "no GPU is used: the NVIDIA driver cannot be queried: Driver/library version mismatch" in shown.stdout
    settings = ("model=tiny", "tracking=none", "cluster.gpu_type=h100", "cluster.ranks_per_node=2", "run.name=on-gpus")
    refused = launch_here("train", *settings, PYTHONPATH=os.environ["PYTHONPATH"])
    assert refused.returncode == 2
    assert "Driver/library version mismatch" in refused.stderr
