from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import nvml
from launcher.config.sections.ray import RaySection
from launcher.config.sections.slurm import SlurmSection
from launcher.errors import Problem
from launcher.nvml import GpuInfo, GpuProcess, NvmlError
from launcher.worker.checks import gpu_check
from launcher.worker.checks.gpu_check import check_gpus, find_slow_gpus

H100 = "NVIDIA H100 80GB HBM3"
SECTION = SlurmSection(kind="slurm", gpu_type="H100-80GB")
HEALTHY = (GpuInfo("GPU-aaaa", H100, "0000:3b:00", 80.0, 0), GpuInfo("GPU-bbbb", H100, "0000:af:00", 80.0, None))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short deadlines, with no GPU selection from the tests' environment."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_check, "COMMAND_DEADLINE_S", 2.0)
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.0)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the GPUs and processes that the driver lists, or the errors it returns, and what dmesg prints or does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def listing(rows: Iterable[Any] | NvmlError) -> Callable[[float], list[Any]]:
        def list_rows(deadline_s: float) -> list[Any]:
            if isinstance(rows, NvmlError):
                raise rows
            return list(rows)

        return list_rows

    def install(
        gpus: Iterable[GpuInfo] | NvmlError = HEALTHY,
        processes: Iterable[GpuProcess] | NvmlError = (),
        log: str = "",
        dmesg: str | None = None,
    ) -> None:
        monkeypatch.setattr(nvml, "list_gpus", listing(gpus))
        monkeypatch.setattr(nvml, "list_processes", listing(processes))
        (folder / "log").write_text(f"{log}\n")
        (folder / "dmesg").write_text(f"#!/bin/sh\n{dmesg or f'cat {folder}/log'}\n")
        (folder / "dmesg").chmod(0o700)

    return install


def test_sound_gpus_of_the_planned_kind_pass(node: Callable[..., None]) -> None:
    log = "NVRM: Xid (PCI:0000:3b:00): 13, pid=99, Graphics Exception\nNVRM: Xid (PCI:0000:3b:00): 63, Row Remapper"
    node(processes=[GpuProcess("GPU-aaaa", os.getpid(), 500, "python")], log=log)
    assert check_gpus(2, SECTION) == ((H100, H100), [])


@pytest.mark.parametrize("start", ["", "\\r", "\\342\\200\\250"])
def test_the_name_of_a_users_program_is_no_fault(node: Callable[..., None], start: str) -> None:
    """The kernel logs the names of crashed processes and files, which may look like a fault."""
    forged = "NVRM: Xid (PCI:0000:3b:00): 79, x"
    node(dmesg=f"printf '[9.1] traps: NVRM: Xid (): 79[77] trap divide error in {start}{forged}[55c0+1000]\\n'")
    assert check_gpus(2, SECTION)[1] == []


@pytest.mark.parametrize(
    ("gpus", "slurm", "ray"),
    [
        (HEALTHY[:1], "cluster.gpus_per_node", "give the node all of its GPUs"),
        ((HEALTHY[0], replace(HEALTHY[1], name="Tesla T4")), "cluster.constraint", "cluster.accelerator_type"),
    ],
)
def test_a_remedy_names_the_settings_of_its_own_cluster(
    node: Callable[..., None], gpus: tuple[str, ...], slurm: str, ray: str
) -> None:
    node(gpus=gpus)
    on_slurm = only(check_gpus(2, SECTION)).remedy
    on_ray = only(check_gpus(2, RaySection(kind="ray", gpu_type="H100-80GB"))).remedy
    assert (slurm in on_slurm, ray in on_ray) == (True, True)
    assert slurm not in on_ray


def only(checked: tuple[tuple[str, ...], list[Problem]]) -> Problem:
    (problem,) = checked[1]
    assert problem.remedy
    return problem


@pytest.mark.parametrize(
    "setting, what, value",
    [
        ({"gpus": HEALTHY[:1]}, "fewer GPUs than ranks", "1 found, 2 needed"),
        (
            {"gpus": (HEALTHY[0], replace(HEALTHY[1], name="NVIDIA A100-SXM4-80GB"))},
            "planned kind",
            "NVIDIA A100-SXM4-80GB found",
        ),
        ({"gpus": (HEALTHY[0], replace(HEALTHY[1], name="Tesla T4"))}, "planned kind", "Tesla T4 found, H100-80GB planned"),
        ({"gpus": (HEALTHY[0], replace(HEALTHY[1], ecc_errors=3))}, "3 memory errors", "GPU-bbbb"),
        (
            {"gpus": (HEALTHY[0], replace(HEALTHY[1], fabric=nvml.FABRIC_STARTING))},
            "NVLink fabric of GPUs is not ready",
            "GPU-bbbb: still starting",
        ),
        (
            {"processes": (GpuProcess("GPU-aaaa", 999999999, 70000, "/usr/bin/python"),)},
            "a process outside this run",
            "process 999999999 (/usr/bin/python)",
        ),
        (
            {"processes": (GpuProcess("GPU-aaaa", 1, 70000, "stale"),)},
            "a process outside this run",
            f"(stale) of {psutil.Process(1).username()}: 70000 MiB of GPU-aaaa",
        ),
        ({"log": "[9.1] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus."}, "Xid 79", "fallen off the bus"),
        (
            {"log": "[9.1] [ T77] NVRM: Xid (PCI:0000:AF:00 GPU-I:05): 48, DBE"},
            "Xid 48: uncorrectable",
            "NVRM: Xid (PCI:0000:AF:00",
        ),
        (
            {"processes": (GpuProcess("GPU-aaaa", 1, None, ""),)},
            "a process outside this run",
            f"process 1 (unknown name) of {psutil.Process(1).username()}: an unknown number of MiB of GPU-aaaa",
        ),
        ({"gpus": NvmlError("the NVIDIA driver did not answer within 2 s")}, "cannot be used: the NVIDIA driver did not", ""),
        ({"processes": NvmlError("the NVIDIA driver cannot be queried: x")}, "cannot be listed: the NVIDIA driver", ""),
    ],
)
def test_an_unusable_gpu_is_reported(
    node: Callable[..., None],
    setting: dict[str, object],
    what: str,
    value: str,
) -> None:
    node(**setting)
    problem = only(check_gpus(2, SECTION))
    assert what in problem.message
    assert value in problem.value


def test_slow_links_and_clocks_are_no_reason_to_refuse_a_node(node: Callable[..., None]) -> None:
    node(gpus=[replace(gpu, pcie_lanes=16, most_pcie_lanes=16, fabric=nvml.FABRIC_READY) for gpu in HEALTHY])
    assert find_slow_gpus() == []
    slow = {"pcie_lanes": 8, "most_pcie_lanes": 16, "slowdowns": ("power brake",), "is_fabric_degraded": True}
    node(gpus=[HEALTHY[0], replace(HEALTHY[1], **slow)])
    assert check_gpus(2, SECTION)[1] == []
    problems = find_slow_gpus()
    assert [problem.value for problem in problems] == [
        f"{H100} GPU-bbbb: 8 of 16 lanes",
        f"{H100} GPU-bbbb: power brake",
        f"{H100} GPU-bbbb",
    ]
    assert all(problem.remedy for problem in problems)
    node(gpus=NvmlError("the NVIDIA driver did not answer within 2 s"))
    assert find_slow_gpus() == []


def test_gpus_may_be_of_any_kind_if_none_is_planned(node: Callable[..., None]) -> None:
    node(gpus=[replace(gpu, name="Tesla T4") for gpu in HEALTHY])
    assert check_gpus(2, RaySection(kind="ray")) == (("Tesla T4", "Tesla T4"), [])


def test_the_check_waits_for_a_process_that_is_ending(node: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_S", 20.0)
    node()
    listings = [[GpuProcess("GPU-aaaa", 999999999, 5, "python")], []]
    monkeypatch.setattr(nvml, "list_processes", lambda deadline_s: listings.pop(0))
    assert check_gpus(2, SECTION)[1] == []
    assert listings == []


def test_only_processes_that_were_there_at_first_are_reported(node: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a local run does not delay its ranks, and in a container their process ids are not those of the driver."""
    monkeypatch.setattr(gpu_check, "GRACE_S", 1.0)
    node()
    left, rank = (GpuProcess("GPU-aaaa", pid, 5, "python") for pid in (999999998, 999999999))
    listings = [[left]]
    monkeypatch.setattr(nvml, "list_processes", lambda deadline_s: listings.pop() if listings else [left, rank])
    assert only(check_gpus(2, SECTION)).value.startswith("process 999999998 (python) ")


def test_an_empty_choice_of_gpus_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is empty" in only(check_gpus(2, SECTION)).message


def test_faults_of_other_jobs_gpus_count_only_if_a_gpu_is_missing(node: Callable[..., None]) -> None:
    log = "NVRM: Xid (PCI:0000:d8:00): 79, GPU has fallen off the bus.\n" * 2 + "NVRM: Xid (PCI:0000:d8:00): 45, cleanup"
    node(log=log)
    assert check_gpus(2, SECTION)[1] == []
    node(gpus=HEALTHY[:1], log=log)
    said = [problem.message for problem in check_gpus(2, SECTION)[1]]
    assert said == ["there are fewer GPUs than ranks", "a GPU has a fault, Xid 79: fallen off the bus"]
    node(gpus=HEALTHY[:1], dmesg="echo dmesg: read kernel buffer failed: Operation not permitted >&2; exit 1")
    assert only(check_gpus(2, SECTION)).message == "there are fewer GPUs than ranks"
