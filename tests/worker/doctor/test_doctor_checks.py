"""Doctor's machine checks, each with a problem to find; fakes replace only devices and packages that are missing here."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import driver
from liger_package import write_package
from plan_fixtures import config_of

from launcher import nvml
from launcher.clusters.check_results import FAILURE, OK, SHARED_FILE_VARIABLE, WARNING, CheckResult, ok
from launcher.config.schema import RunConfig
from launcher.worker.checks import gpu_check
from launcher.worker.doctor import all_reduce, gpus, machine, storage, toolchain
from launcher.worker.doctor.node import CHECKS, run_check
from launcher.worker.doctor.torch_build import TorchBuild

__all__ = ["config_of", "driver"]

REPO = Path(__file__).resolve().parents[3]
H100 = {"uuid": "GPU-aaaa", "name": "NVIDIA H100 80GB HBM3", "bus": "00000000:3B:00.0", "memory_gib": 80, "ecc": 0}
OTHER = {**H100, "uuid": "GPU-bbbb", "bus": "00000000:AF:00.0"}
WITH_CUDA = TorchBuild("2.9.0+cu128", "12.8", 2, "2.27.5", "")
Check = Callable[[RunConfig], Iterator[CheckResult]]


@pytest.fixture
def config(config_of: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda *tokens: config_of(f"run.root={tmp_path}/runs", *tokens)


@pytest.fixture
def gpu_machine(driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with an NVIDIA driver, as `driver` sets it, and a build of torch."""
    monkeypatch.setattr(nvml, "has_driver", lambda: True)
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.0)

    def install(build: TorchBuild | str = WITH_CUDA, devices: tuple[dict[str, Any], ...] = (H100, OTHER), **answers: Any) -> None:
        driver(list(devices), **answers)
        for module in (gpus, toolchain, all_reduce, storage):
            monkeypatch.setattr(module, "read_torch_build", lambda: build)

    return install


def verdicts(check: Check, config: RunConfig) -> list[str]:
    return [result.verdict for result in check(config)]


def only(results: Iterator[CheckResult]) -> CheckResult:
    (result,) = results
    return result


def test_healthy_gpus_are_ok_and_counted(gpu_machine: Callable[..., None], config: Callable[..., RunConfig]) -> None:
    gpu_machine()
    found = only(gpus.check_gpus(config("cluster.ranks_per_node=2")))
    assert (found.verdict, found.seen, found.must_match) == (OK, "2 x NVIDIA H100 80GB HBM3, H100-80GB", True)
    assert only(gpus.check_gpu_memory(config())).seen == "79.0 of 80.0 GiB free on the GPU with the least"


def test_bad_gpus_get_the_messages_of_the_node_check(gpu_machine: Callable[..., None], config: Callable[..., RunConfig]) -> None:
    gpu_machine(devices=({**H100, "ecc": 3}, OTHER), processes=[("GPU-bbbb", os.getppid(), 1000, "python")])
    first, *failures = gpus.check_gpus(config("cluster.ranks_per_node=4"))
    assert first.verdict == OK
    assert [result.verdict for result in failures] == [FAILURE] * 3
    assert [result.seen.partition(":")[0] for result in failures] == [
        "there are fewer GPUs than ranks",
        "a GPU had 3 memory errors that could not be corrected",
        "a process outside this run holds GPU memory",
    ]
    assert all(result.remedy for result in failures)


def test_slow_links_and_clocks_are_warnings(gpu_machine: Callable[..., None], config: Callable[..., RunConfig]) -> None:
    gpu_machine(devices=({**H100, "lanes": (4, 16), "slowdowns": 0x40}, OTHER))
    shown, *slow = gpus.check_gpus(config("cluster.ranks_per_node=2"))
    assert (shown.verdict, [result.verdict for result in slow]) == (OK, [WARNING] * 2)
    assert "GPU-aaaa: 4 of 16 lanes" in slow[0].seen
    assert "GPU-aaaa: thermal limit of the hardware" in slow[1].seen


def test_gpus_without_a_row_and_memory_of_hidden_processes_are_warnings(
    gpu_machine: Callable[..., None], config: Callable[..., RunConfig]
) -> None:
    gpu_machine(devices=({**H100, "name": "NVIDIA Z9", "free_gib": 20},))
    shown, unknown = gpus.check_gpus(config())
    assert shown.seen == "1 x NVIDIA Z9, not in the table of GPU types"
    assert (unknown.verdict, "cluster.gpu_type" in unknown.remedy) == (WARNING, True)
    hidden = only(gpus.check_gpu_memory(config()))
    assert hidden.verdict == WARNING
    assert "GPU-aaaa: 20.0 of 80.0 GiB free" in hidden.seen


def test_a_machine_without_a_driver_is_a_failure_only_for_runs_on_gpus(
    monkeypatch: pytest.MonkeyPatch, config: Callable[..., RunConfig]
) -> None:
    monkeypatch.setattr(nvml, "has_driver", lambda: False)
    assert verdicts(gpus.check_gpus, config()) == [WARNING]
    assert verdicts(gpus.check_gpus, config("cluster.gpu_type=H100-80GB")) == [FAILURE]
    monkeypatch.setattr(nvml, "has_driver", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = only(gpus.check_gpus(config()))
    assert (hidden.verdict, hidden.remedy) == (WARNING, "unset CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("build", "cuda", "verdict", "seen", "remedy"),
    [
        (WITH_CUDA, 12080, OK, "a kernel ran on each of 2 GPUs", ""),
        (TorchBuild("2.9.0+cpu", "", 0, "", ""), 12060, FAILURE, "built without CUDA", "whl/cu126"),
        # Not every CUDA version has a package index: choose the newest one that the driver supports.
        (TorchBuild("2.9.0+cpu", "", 0, "", ""), 12040, FAILURE, "built without CUDA", "whl/cu126"),
        (TorchBuild("2.9.0+cpu", "", 0, "", ""), 12090, FAILURE, "built without CUDA", "whl/cu128"),
        (TorchBuild("2.9.0+cpu", "", 0, "", ""), 13010, FAILURE, "built without CUDA", "whl/cu130"),
        (TorchBuild("2.9.0+cpu", "", 0, "", ""), 11080, FAILURE, "built without CUDA", "update the driver"),
        (TorchBuild("2.13.0", "13.0", 0, "2.28.9", "driver too old"), 12080, FAILURE, "driver too old", "update the driver"),
        (TorchBuild("2.9.0", "12.8", 0, "2.27.5", "unknown error"), 12080, FAILURE, "unknown error", "nvidia-smi"),
        ("ImportError: libcudart.so.12", 12080, FAILURE, "torch cannot be imported: ImportError", "--force-reinstall"),
    ],
)
def test_torch_is_compared_with_the_driver(
    gpu_machine: Callable[..., None],
    config: Callable[..., RunConfig],
    build: TorchBuild | str,
    cuda: int,
    verdict: str,
    seen: str,
    remedy: str,
) -> None:
    gpu_machine(build, cuda=cuda)
    found = only(gpus.check_torch(config()))
    assert found.verdict == verdict
    assert seen in found.seen
    assert remedy in found.remedy


@pytest.mark.parametrize(("release", "verdict"), [("12.4", OK), ("11.8", WARNING), (None, WARNING)])
def test_nvcc_is_compared_with_torch_as_deepspeed_does(
    gpu_machine: Callable[..., None],
    config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    release: str | None,
    verdict: str,
) -> None:
    gpu_machine()
    (tmp_path / "bin").mkdir()
    if release is not None:
        nvcc = tmp_path / "bin/nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        nvcc.chmod(0o700)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    *_, found = toolchain.check_compiler(config())
    assert found.verdict == verdict
    assert "nvcc" in found.seen
    *_, needed = toolchain.check_compiler(config("deepspeed=zero3_offload"))
    assert needed.verdict == (OK if verdict == OK else FAILURE)


def test_missing_compilers_are_failures_only_where_something_is_offloaded(
    monkeypatch: pytest.MonkeyPatch, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    monkeypatch.setattr(nvml, "has_driver", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert verdicts(toolchain.check_compiler, config()) == [WARNING, WARNING]
    assert verdicts(toolchain.check_compiler, config("deepspeed=zero3_offload")) == [FAILURE, FAILURE]


def test_a_compiler_and_headers_are_looked_for_where_liger_or_torch_build_kernels(
    gpu_machine: Callable[..., None], config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def found(*tokens: str) -> list[str]:
        results = [result for result in toolchain.check_compiler(config(*tokens)) if "needed for" in result.seen]
        return [f"{result.verdict}: {result.seen.partition('needed for ')[2]}; {result.remedy}" for result in results]

    gpu_machine()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    asked = f"{FAILURE}: model.compile=true and model.liger=true; apt-get install gcc"
    assert found("model.compile=true", "model.liger=true") == [asked]
    assert found() == []
    install_liger(tmp_path, monkeypatch)
    assert found() == [f"{WARNING}: Liger's kernels (model.liger=auto, else runs train without them); apt-get install gcc"]
    assert found("model.liger=false") == []


@pytest.mark.rest
def test_liger_is_tried_on_the_gpu_as_ranks_do(
    gpu_machine: Callable[..., None], config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu_machine()
    install_liger(tmp_path, monkeypatch)
    with monkeypatch.context() as without_driver:
        without_driver.setattr(nvml, "has_driver", lambda: False)
        assert only(toolchain.check_liger(config())).seen == "liger-kernel 0.8.5 can be imported"
    tried = only(toolchain.check_liger(config()))
    assert tried.verdict == WARNING
    # torch's message when it computes on a GPU that does not exist.
    assert tried.seen.startswith("liger-kernel 0.8.5 cannot be used: ")
    assert "CUDA" in tried.seen or "NVIDIA" in tried.seen
    assert verdicts(toolchain.check_liger, config("model.liger=true")) == [FAILURE]


def install_liger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(folder)
    (folder / "liger_kernel-0.8.5.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: liger-kernel\nVersion: 0.8.5\n"
    (folder / "liger_kernel-0.8.5.dist-info/METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


def test_a_kernel_for_another_torch_fails_with_the_last_line_of_its_traceback(
    gpu_machine: Callable[..., None], config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    error = "ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi')"
    (package / "__init__.py").write_text(f"raise {error}\n")
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    gpu_machine()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    found = only(toolchain.check_flash_attention(config("model.attention=flash_attention_2")))
    assert found.verdict == FAILURE
    assert found.seen.startswith("flash-attn 2.8.3 cannot be imported: ImportError: flash_attn_2_cuda.so: undefined symbol")
    # With model.attention=auto, ranks use only a kernel that they can import, so this is a warning.
    assert verdicts(toolchain.check_flash_attention, config()) == [WARNING]
    (package / "__init__.py").write_text("flash_attn_func = flash_attn_varlen_func = None\n")
    assert verdicts(toolchain.check_flash_attention, config()) == [OK]
    # Each version is a package of its own, and ranks try all of them.
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    (tmp_path / "flash_attn_3-3.0.0.dist-info").mkdir()
    (tmp_path / "flash_attn_3-3.0.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-3\nVersion: 3.0.0\n")
    of_2, of_3 = toolchain.check_flash_attention(config())
    assert (of_2.verdict, of_3.verdict) == (OK, WARNING)
    assert of_3.seen.startswith("flash-attn-3 3.0.0 cannot be imported: ImportError: libcudart.so.12")


def test_a_kernel_that_the_settings_ask_for_must_be_installed(config: Callable[..., RunConfig]) -> None:
    found = only(toolchain.check_flash_attention(config("model.attention=flash_attention_3")))
    assert found.verdict == FAILURE
    assert "model.attention=auto" in found.remedy


@pytest.mark.rest
def test_ranks_that_fail_are_reported_with_their_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either this torch has no CUDA or the machine has no GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bandwidth, reason = all_reduce._run_ranks("cuda", 1, tmp_path)
    assert bandwidth == 0.0
    assert reason.startswith("rank 0: ")
    assert "cuda" in reason.lower() or "nvidia driver" in reason.lower()


def test_ranks_that_do_not_meet_are_killed_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_reduce, "DEADLINE_S", 1.0)
    assert all_reduce._run_ranks("cpu", 2, tmp_path)[1] == "rank 0: did not end within 1 s"


def test_storage_is_measured_and_left_as_it_was(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    speed, room = storage.check_run_storage(config())
    assert speed.verdict in (OK, WARNING)
    assert f"{tmp_path}/runs on " in speed.seen
    assert "MB/s" in speed.seen
    assert "inodes free" in room.seen
    assert list(tmp_path.iterdir()) == []


def test_storage_that_is_another_than_the_submitting_machines_is_a_failure(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "known"
    monkeypatch.setenv(SHARED_FILE_VARIABLE, f"{file}=12ab")
    assert verdicts(storage.check_run_storage, config()) == [FAILURE]
    file.write_text("other")
    assert verdicts(storage.check_run_storage, config()) == [FAILURE]
    file.write_text("12ab")
    assert FAILURE not in verdicts(storage.check_run_storage, config())


def test_locks_without_effect_are_a_failure(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    failures = [result for result in storage.check_run_storage(config()) if result.verdict == FAILURE]
    assert [result.seen for result in failures] == ["file locks have no effect: a locked file could be locked again"]


def in_a_namespace(script: str, code: str) -> list[str]:
    """What `code` prints in a process whose mounts or limits `script` has changed."""
    shell = f'{script} && exec "{sys.executable}" -c "$0"'
    command = ["unshare", "-m", "sh", "-c", shell, code]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (REPO, REPO / "tests", REPO / "slurm")))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PRINT = (
    "from plan_fixtures import composed; from launcher.worker.doctor import machine, storage;"
    "config = composed(('model=tiny', 'run.root={root}'));"
    "[print(r.verdict, r.seen, '|', r.remedy) for r in {check}(config)]"
)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize(("options", "message"), [("size=16m", "No space left on device"), ("ro", "cannot be written")])
def test_full_and_read_only_storage_are_failures(tmp_path: Path, options: str, message: str) -> None:
    code = PRINT.format(root=tmp_path / "runs", check="storage.check_run_storage")
    (line,) = in_a_namespace(f"mount -t tmpfs -o {options} tmpfs {tmp_path}", code)
    assert line.startswith("failure ")
    assert message in line


@pytest.mark.rest
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_low_limits_and_little_shared_memory_are_failures(tmp_path: Path) -> None:
    limits = in_a_namespace("ulimit -n 512", PRINT.format(root=tmp_path, check="machine.check_limits"))
    assert limits[0] == (
        "failure open files (ulimit -n) are limited to 512 | "
        "raise `nofile` in /etc/security/limits.conf; docker run takes --ulimit nofile=65536"
    )
    code = PRINT.format(root=tmp_path, check="storage.check_shared_memory")
    (line,) = in_a_namespace("mount -t tmpfs -o size=1m tmpfs /dev/shm", code)
    assert line.startswith("failure the ranks of a node have too little shared memory to communicate: /dev/shm: 1 MiB free")


def test_a_soft_limit_can_be_raised_by_the_user(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    code = PRINT.format(root=tmp_path, check="machine.check_limits")
    command = ["sh", "-c", f'ulimit -Sn 512 && exec "{sys.executable}" -c "$0"', code]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (REPO, REPO / "tests", REPO / "slurm")))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert "| ulimit -n " in done.stdout.splitlines()[0], done.stderr


def test_other_versions_than_tested_are_a_warning_and_unmet_requirements_a_failure(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = machine._constraints()
    assert pins is not None
    versions = {pin.name: next(part.version for part in pin.specifier if part.operator in ("==", ">=")) for pin in pins}
    monkeypatch.setattr(machine, "_version", versions.get)
    assert verdicts(machine.check_packages, config()) == [OK]
    versions["deepspeed"] = "0.1"
    shown, unmet, others = machine.check_packages(config())
    assert (shown.verdict, shown.must_match) == (OK, True)
    assert unmet.verdict == FAILURE
    assert re.search(r"deepspeed 0\.1 \(>=[\d.]+ is required\)", unmet.seen)
    assert others.verdict == WARNING
    assert "deepspeed 0.1 (==0.19.8)" in others.seen


def test_a_cache_of_another_user_is_a_warning(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path))
    assert next(iter(storage.check_caches(config()))).verdict != FAILURE
    os.chown(tmp_path, 65534, -1)
    found = next(iter(storage.check_caches(config())))
    assert found.verdict == WARNING
    assert "belongs to" in found.seen
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (found,) = (result for result in storage.check_caches(config()) if "TRITON_CACHE_DIR names is not trusted" in result.seen)
    assert found.verdict == WARNING


def test_a_check_that_hangs_or_raises_does_not_keep_the_others(config: Callable[..., RunConfig]) -> None:
    def hanging(_: RunConfig) -> Iterator[CheckResult]:
        yield ok("the first part")
        time.sleep(60)

    def raising(_: RunConfig) -> Iterator[CheckResult]:
        yield ok("the first part")
        raise ValueError("broken")

    for check, message in ((hanging, "no answer within 0 s"), (raising, "the check failed: ValueError: broken")):
        first, second = run_check("name", check, config(), 0.2)
        assert (first.name, first.verdict) == ("name", OK)
        assert (second.name, second.verdict) == ("name", FAILURE)
        assert message in second.seen


def test_every_check_has_a_deadline() -> None:
    assert len(CHECKS) >= 13
    assert all(0 < deadline_s <= 300 for _, deadline_s in CHECKS.values())
