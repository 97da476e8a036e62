"""A machine's GPUs, their driver, and whether torch can use them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from launcher import nvml
from launcher.clusters.check_results import WARNING, CheckResult, failure, from_problem, ok, warning
from launcher.config.schema import RunConfig
from launcher.hardware import may_use_gpus
from launcher.nvml import GpuInfo, NvmlError
from launcher.plan.gpu_types import recognize
from launcher.worker.checks import gpu_check
from launcher.worker.doctor.torch_build import TorchBuild, read_torch_build

# The CUDA versions that have a wheel index, for each torch that the launcher supports, from 2.9 on
# (https://pytorch.org/get-started/previous-versions).
_WHEEL_CUDA = ((12, 6), (12, 8), (13, 0))
# The driver itself and a display take less than this.
_MAX_USED_FRACTION = 0.05


def check_gpus(config: RunConfig) -> Iterator[CheckResult]:
    """Check number, model, memory errors, faults in the kernel log, processes that hold memory, PCIe, clocks and NVLink."""
    section = config.cluster
    if nvml.has_driver() and not may_use_gpus():
        seen = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides all GPUs: runs on this machine train on the CPU"
        yield (failure if section.gpu_type else warning)(seen, "unset CUDA_VISIBLE_DEVICES")
        return
    if not nvml.has_driver():
        seen = "no NVIDIA driver is loaded: runs on this machine train on the CPU"
        remedy = "on a machine with GPUs, install the driver, or start the container with: docker run --gpus all"
        yield (failure if section.gpu_type else warning)(seen, remedy)
        return
    names, problems = gpu_check.check_gpus(section.ranks_per_node or 1, section)
    if names:
        counts = Counter(f"{name}, {recognize(name) or 'not in the table of GPU types'}" for name in names)
        yield ok("; ".join(f"{count} x {name}" for name, count in counts.items()), must_match=True)
    yield from map(from_problem, problems)
    yield from (from_problem(problem, WARNING) for problem in gpu_check.find_slow_gpus())
    if unknown := sorted({name for name in names if recognize(name) is None}):
        remedy = "set cluster.gpu_type to the closest type, or add a row: docs/extending.md, A GPU type"
        yield warning(f"memory, peak and price are not known for {', '.join(unknown)}", remedy)


def check_gpu_memory(config: RunConfig) -> Iterator[CheckResult]:
    """Check that GPU memory is free, including memory held by processes that the driver does not list."""
    if not may_use_gpus():
        return
    try:
        gpus = [gpu for gpu in nvml.list_gpus() if gpu.free_gib is not None and gpu.memory_gib]
        listed = {process.gpu_uuid for process in nvml.list_processes()}
    except NvmlError:
        # The GPU check reports this.
        return
    used = [gpu for gpu in gpus if gpu.uuid not in listed and _used_fraction(gpu) > _MAX_USED_FRACTION]
    if used:
        shown = ", ".join(f"{gpu.uuid}: {gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB free" for gpu in used)
        seen = f"GPU memory is held, but the driver lists no process, which may be in another container: {shown}"
        yield warning(seen, "find it on the host with nvidia-smi, and end it")
    elif gpus:
        least = min(gpus, key=lambda gpu: gpu.free_gib or 0.0)
        yield ok(f"{least.free_gib:.1f} of {least.memory_gib:.1f} GiB free on the GPU with the least")


def _used_fraction(gpu: GpuInfo) -> float:
    return 1 - (gpu.free_gib or 0.0) / (gpu.memory_gib or 1.0)


def check_torch(config: RunConfig) -> Iterator[CheckResult]:
    """Check that torch can be imported, and that its build uses the GPUs of this machine."""
    build = read_torch_build()
    if isinstance(build, str):
        yield failure(f"torch cannot be imported: {build}", "pip install --force-reinstall torch")
        return
    shown = f"torch {build.version}, {f'built for CUDA {build.cuda}' if build.cuda else 'built without CUDA'}"
    if not may_use_gpus():
        yield ok(shown, must_match=True)
        return
    driver = nvml.DriverInfo("", "")
    try:
        driver = nvml.read_driver()
    except NvmlError:
        # The GPU check reports this.
        pass
    shown += f"; driver {driver.version or 'unknown'} supports CUDA {driver.cuda or 'unknown'}"
    yield _judge_build(build, driver.cuda, shown)


def _judge_build(build: TorchBuild, driver_cuda: str, shown: str) -> CheckResult:
    if not build.cuda:
        return failure(shown, _install_remedy(driver_cuda))
    if build.num_gpus:
        return ok(f"{shown}; NCCL {build.nccl}; a kernel ran on each of {build.num_gpus} GPUs", must_match=True)
    # A driver runs programs of newer minor versions of its CUDA, not of a newer major version.
    if driver_cuda and _major(driver_cuda) < _major(build.cuda):
        remedy = (
            f"update the driver to one that supports CUDA {build.cuda}, or install a torch that is built for CUDA {driver_cuda}"
        )
    else:
        remedy = "look at the driver with nvidia-smi, and at the kernel's log with dmesg; in a container, check --gpus all"
    return failure(f"{shown}; torch cannot use the GPUs: {build.problem or 'it sees none'}", remedy)


def _install_remedy(driver_cuda: str) -> str:
    """Return how to install the newest build that is not above the driver's CUDA, or else the oldest of its major version."""
    supported = tuple(int(part) for part in driver_cuda.split(".")[:2]) if driver_cuda else _WHEEL_CUDA[0]
    runnable = [cuda for cuda in _WHEEL_CUDA if cuda <= supported]
    runnable = runnable or [cuda for cuda in _WHEEL_CUDA if cuda[0] == supported[0]][:1]
    if not runnable:
        oldest = ".".join(map(str, _WHEEL_CUDA[0]))
        return f"update the driver: no build of this torch has the CUDA {driver_cuda} that it supports, {oldest} is the oldest"
    index = "https://download.pytorch.org/whl/cu{}{}".format(*runnable[-1])
    return f"install a build with CUDA: pip install --force-reinstall torch --index-url {index}"


def _major(version: str) -> int:
    return int(version.partition(".")[0])
