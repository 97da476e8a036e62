"""Checks of a node beside its GPUs and its storage: memory, limits, network adapters, versions, compilers and kernels."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil

import launcher
from launcher.clusters.cgroups import LimitEvents
from launcher.clusters.check_results import CheckResult, failure, ok, warning
from launcher.hardware import may_use_gpus
from launcher.plan.quantities import format_size
from launcher.train.kernels.build_tools import missing_build_tools
from launcher.worker.checks.checked_node import CheckedNode, run_python

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
# Containers get 64 MiB by default, which is too little for NCCL to connect a node's GPUs.
_SHARED_MEMORY_BYTES, _SHARED_MEMORY_OF_GPUS_BYTES = 64 << 20, 1 << 30
# Adapters for InfiniBand, RoCE and EFA: in the kernel, which a container sees too, and the devices, which it may lack.
ADAPTERS, ADAPTER_DEVICES = Path("/sys/class/infiniband"), Path("/dev/infiniband")
OWN_STATUS = Path("/proc/self/status")
_CAP_IPC_LOCK = 14
_PACKAGES = (
    *("torch", "deepspeed", "transformers", "accelerate", "tokenizers", "numpy", "safetensors", "liger-kernel"),
    *("huggingface-hub", "ray", "flash-attn", "flash-attn-3", "flash-attn-4"),
)
# Enough to distinguish two versions of the code.
_DIGEST_CHARS = 8
_IMPORT_S = 180.0
# For each kernel: the setting that requests it, and what ranks import.
_KERNELS = {
    "flash-attn": ("model.attention=flash_attention_2", "from flash_attn import flash_attn_func, flash_attn_varlen_func"),
    "flash-attn-3": ("model.attention=flash_attention_3", "from flash_attn_interface import flash_attn_func"),
    "flash-attn-4": ("model.attention=flash_attention_4", "from flash_attn.cute import flash_attn_func"),
    "liger-kernel": ("model.liger=True", "from liger_kernel.transformers import _apply_liger_kernel_to_instance"),
}
_TRY_LIGER = (
    "import torch; from launcher.train.kernels.liger import try_kernels; "
    "try_kernels('llama', torch.device('cuda'), torch.float32)"
)


def check_memory(node: CheckedNode) -> Iterator[CheckResult]:
    """Compare the main memory that this job may use with what the plan offloads to it."""
    available = min(filter(None, (psutil.virtual_memory().available, LimitEvents.read().memory_bytes)))
    needed_gib = node.plan.memory.host_per_node_gib if node.plan is not None else 0.0
    if available / 2**30 < needed_gib:
        seen = f"there is too little main memory for the offloaded states: {format_size(available)} available, "
        remedy = f"{node.config.cluster.memory_remedy}, offload less, or use more nodes"
        yield failure(f"{seen}{needed_gib:.1f} GiB needed", remedy)
    else:
        yield ok(f"{len(os.sched_getaffinity(0))} CPU cores, {format_size(available)} of main memory available")


def check_shared_memory(node: CheckedNode) -> Iterator[CheckResult]:
    """Check /dev/shm, through which the ranks of a node communicate."""
    least = _SHARED_MEMORY_OF_GPUS_BYTES if node.device == "cuda" and node.num_ranks > 1 else _SHARED_MEMORY_BYTES
    usage = shutil.disk_usage(SHARED_MEMORY)
    shown = f"{format_size(usage.free)} of {format_size(usage.total)} free"
    if usage.free < least:
        seen = "the ranks of a node have too little shared memory to communicate"
        remedy = "remove stale files there, or give the container more (--shm-size, or an emptyDir of medium Memory)"
        yield failure(f"{seen}: {SHARED_MEMORY}: {shown}, {format_size(least)} needed", remedy)
    else:
        yield ok(shown)


def check_adapters(node: CheckedNode) -> Iterator[CheckResult]:
    """Check whether NCCL can use the adapters for InfiniBand, RoCE or EFA, if there are any."""
    try:
        adapters = ", ".join(sorted(adapter.name for adapter in ADAPTERS.iterdir()))
    except OSError:
        return
    if adapters and not any(ADAPTER_DEVICES.glob("uverbs*")):
        remedy = "pass them to the container: docker run takes --device=/dev/infiniband, Kubernetes a resource such as rdma/ib"
        yield warning(f"the network adapters cannot be opened here, so NCCL uses TCP: {adapters}", remedy)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    # The limit does not apply to processes with this capability.
    effective = OWN_STATUS.read_text().partition("CapEff:")[2].split()[0]
    if adapters and locked != resource.RLIM_INFINITY and not int(effective, 16) >> _CAP_IPC_LOCK & 1:
        remedy = "set `* - memlock unlimited` in /etc/security/limits.conf, for Slurm also LimitMEMLOCK=infinity in "
        remedy += "slurmd.service, for Kubernetes in containerd.service; docker run takes --ulimit memlock=-1"
        seen = "locked memory is limited, so NCCL may fail to use the network adapters"
        yield warning(f"{seen}: ulimit -l is {locked // 1024} KiB", remedy)


def check_packages(node: CheckedNode) -> Iterator[CheckResult]:
    """Report the versions that must be the same on all nodes: the run's code, Python, and the packages that compute."""
    code = node.run.code if node.plan is not None else Path(launcher.__file__).resolve().parent
    digest = hashlib.blake2b()
    for file in sorted(code.rglob("*.py")):
        for part in (str(file.relative_to(code)).encode(), file.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    versions = {"launcher": launcher.__version__, "code": digest.hexdigest()[:_DIGEST_CHARS], "Python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    yield ok(", ".join(f"{name} {version}" for name, version in versions.items()), must_match=True)


def check_build_tools(node: CheckedNode) -> Iterator[CheckResult]:
    """Look for the compilers that torch.compile and Liger need; DeepSpeed names those of its offloading itself."""
    section = node.config.model
    uses_liger = section.liger is True and node.device == "cuda"
    settings = [*(["model.compile=true"] if section.compile else []), *(["model.liger=true"] if uses_liger else [])]
    for problem in missing_build_tools(node.device) if settings else ():
        yield failure(f"{problem.message}, for {' and '.join(settings)}: {problem.value}", problem.remedy)


def check_kernels(node: CheckedNode) -> Iterator[CheckResult]:
    """Import the optional kernels that are installed or requested: a build for another torch fails only on import.

    On a GPU, Liger's kernels also compute, as in the ranks' own trial.
    """
    model = node.config.model
    requested = (f"model.attention={model.attention}", f"model.liger={model.liger}")
    for package, (setting, statement) in _KERNELS.items():
        result = failure if setting in requested else warning
        remedy = f"build it for this torch: pip install --force-reinstall --no-deps --no-build-isolation {package}"
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            if setting in requested:
                yield failure(f"{package} is not installed, and the run asks for it: {setting}", f"pip install {package}")
            continue
        computes = package == "liger-kernel" and may_use_gpus()
        _, problem = run_python(["-c", _TRY_LIGER if computes else statement], _IMPORT_S)
        if problem:
            yield result(f"{package} {version} cannot be used: {problem}", remedy)
        else:
            yield ok(f"{package} {version} {'computes' if computes else 'can be imported'}", must_match=True)
