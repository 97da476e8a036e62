from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launcher.config.ray import RaySection
from launcher.config.slurm import SlurmSection
from launcher.errors import Problem
from launcher.worker.checks import gpu_check
from launcher.worker.checks.gpu_check import check_gpus

H100 = "NVIDIA H100 80GB HBM3"
SECTION = SlurmSection(kind="slurm", gpu_type="H100-80GB")
HEALTHY = (f"GPU-aaaa, {H100}, 00000000:3B:00.0, 0", f"GPU-bbbb, {H100}, 00000000:AF:00.0, [N/A]")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short deadlines, and no choice of GPUs from the environment of the tests."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_check, "COMMAND_DEADLINE_S", 2.0)
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.0)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An nvidia-smi that knows the GPUs and processes given and keeps its arguments, and a dmesg; returns their folder."""

    def install(gpus: tuple[str, ...] = HEALTHY, processes: tuple[str, ...] = (), log: str = "", **scripts: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, lines in (("gpus", gpus), ("processes", processes), ("log", (log,))):
            (folder / name).write_text("".join(f"{line}\n" for line in lines))
        smi = (
            f'echo "$*" >> {folder}/asked\n'
            f'case "$1" in --query-gpu=*) cat {folder}/gpus ;;\n'
            f"--query-compute-apps=*) cat {folder}/processes ;; *) exit 2 ;; esac"
        )
        for name, text in {"nvidia-smi": smi, "dmesg": f"cat {folder}/log", **scripts}.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o700)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return folder

    return install


def test_sound_gpus_of_the_planned_kind_pass(commands: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    log = "NVRM: Xid (PCI:0000:3b:00): 13, pid=99, Graphics Exception\nNVRM: Xid (PCI:0000:3b:00): 63, Row Remapper"
    folder = commands(processes=(f"GPU-aaaa, {os.getpid()}, 500, python",), log=log)
    assert check_gpus(2, SECTION) == ((H100, H100), [])
    asked = (folder / "asked").read_text().splitlines()
    assert len(asked) == 2
    assert all(line.endswith("--format=csv,noheader,nounits -i 2,3") for line in asked)


@pytest.mark.parametrize(
    ("gpus", "slurm", "ray"),
    [
        (HEALTHY[:1], "cluster.gpus_per_node", "give the node all of its GPUs"),
        ((HEALTHY[0], HEALTHY[1].replace(H100, "Tesla T4")), "cluster.constraint", "cluster.accelerator_type"),
    ],
)
def test_a_remedy_names_the_settings_of_its_own_cluster(
    commands: Callable[..., Path], gpus: tuple[str, ...], slurm: str, ray: str
) -> None:
    commands(gpus=gpus)
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
            {"gpus": (HEALTHY[0], HEALTHY[1].replace(H100, "NVIDIA A100-SXM4-80GB"))},
            "planned kind",
            "NVIDIA A100-SXM4-80GB found",
        ),
        ({"gpus": (HEALTHY[0], HEALTHY[1].replace(H100, "Tesla T4"))}, "planned kind", "Tesla T4 found, H100-80GB planned"),
        ({"gpus": (HEALTHY[0], HEALTHY[1].replace("[N/A]", "3"))}, "3 memory errors", "GPU-bbbb"),
        (
            {"processes": ("GPU-aaaa, 999999999, 70000, /usr/bin/python",)},
            "not of this run",
            "process 999999999 (/usr/bin/python)",
        ),
        (
            {"processes": ("GPU-aaaa, 1, 70000, stale",)},
            "not of this run",
            f"(stale) of {psutil.Process(1).username()}: 70000 MiB of GPU-aaaa",
        ),
        ({"log": "[9.1] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus."}, "Xid 79", "fallen off the bus"),
        ({"log": "[9.1] NVRM: Xid (0000:AF:00): 48, DBE"}, "Xid 48: uncorrectable", "NVRM: Xid (0000:AF:00): 48, DBE"),
        ({"nvidia-smi": "echo No devices were found; exit 6"}, "nvidia-smi failed: No devices were found", ""),
        ({"nvidia-smi": "exec sleep 60"}, "nvidia-smi did not answer", ""),
        ({"nvidia-smi": 'case "$1" in --query-gpu*) cat ${0%/*}/gpus;; *) exit 9;; esac'}, "cannot be listed", ""),
    ],
)
def test_a_gpu_that_will_not_do_is_told(
    commands: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    setting: dict[str, object],
    what: str,
    value: str,
) -> None:
    commands(**setting)
    started = time.monotonic()
    problem = only(check_gpus(2, SECTION))
    assert time.monotonic() - started < 20
    assert what in problem.what
    assert value in problem.value


def test_gpus_may_be_of_any_kind_where_none_is_planned(commands: Callable[..., Path]) -> None:
    commands(gpus=tuple(line.replace(H100, "Tesla T4") for line in HEALTHY))
    assert check_gpus(2, RaySection(kind="ray")) == (("Tesla T4", "Tesla T4"), [])


def test_a_process_that_is_just_ending_is_awaited(commands: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_S", 20.0)
    smi = (
        'case "$1" in --query-gpu=*) cat ${0%/*}/gpus ;;\n'
        "*) [ -e ${0%/*}/listed ] || echo GPU-aaaa, 999999999, 5, python; touch ${0%/*}/listed ;; esac"
    )
    folder = commands(**{"nvidia-smi": smi})
    assert check_gpus(2, SECTION)[1] == []
    assert (folder / "listed").exists()


def test_a_missing_driver_and_an_empty_choice_of_gpus_are_told(
    commands: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is empty" in only(check_gpus(2, SECTION)).what
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "nvidia-smi cannot be started" in only(check_gpus(2, SECTION)).what


def test_faults_of_other_jobs_gpus_count_only_where_a_gpu_is_missing(commands: Callable[..., Path]) -> None:
    log = "NVRM: Xid (PCI:0000:d8:00): 79, GPU has fallen off the bus.\n" * 2 + "NVRM: Xid (PCI:0000:d8:00): 45, cleanup"
    commands(log=log)
    assert check_gpus(2, SECTION)[1] == []
    commands(gpus=HEALTHY[:1], log=log)
    said = [problem.what for problem in check_gpus(2, SECTION)[1]]
    assert said == ["there are fewer GPUs than ranks", "a GPU has a fault, Xid 79: fallen off the bus"]
    commands(gpus=HEALTHY[:1], dmesg="echo dmesg: read kernel buffer failed: Operation not permitted >&2; exit 1")
    assert only(check_gpus(2, SECTION)).what == "there are fewer GPUs than ranks"
