"""Checks of a node's GPUs: by the driver without using them, with torch, and an all-reduce over all of them.

`python -m launcher.worker.checks.gpus torch|all-reduce DEVICE` computes in a process of its own: a CUDA call may hang or crash.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta

import psutil

from launcher import nvml
from launcher.clusters.check_results import CheckResult, failure, ok, warning
from launcher.clusters.network import LOOPBACK
from launcher.errors import describe
from launcher.hardware import may_use_gpus
from launcher.nvml import GpuInfo, NvmlError
from launcher.plan.gpu_types import lookup
from launcher.worker.checks.machine import CheckedNode, run_python

COMMAND_DEADLINE_S = 20.0
# The processes of an attempt that just ended need a while to free their memory.
GRACE_S = 10.0
_PAUSE_S = 0.5
# Seconds for an import of torch, and for an all-reduce.
COMPUTE_DEADLINE_S = 180.0
_RANKS_ON_CPU = 2
# PCIe 3.0 reaches twice this between two GPUs.
_SLOW_GB_PER_S = 5.0
# The driver itself and a display take less than this.
_MAX_USED_FRACTION = 0.05
# System services, which may hold memory on any GPU.
_SERVICES = re.compile(r"nvidia-cuda-mps|dcgm|nv-hostengine")
_EXCLUDE = "exclude this node and tell the administrators"


def check_gpus(node: CheckedNode) -> Iterator[CheckResult]:
    """Check number, type, memory errors, clocks, and who holds their memory."""
    section = node.config.cluster
    if not may_use_gpus():
        seen = "CUDA_VISIBLE_DEVICES hides all GPUs" if nvml.has_driver() else "no NVIDIA driver is loaded"
        remedy = "unset CUDA_VISIBLE_DEVICES; on a new machine, install the driver; start a container with --gpus all"
        yield (failure if node.device == "cuda" else warning)(f"{seen}: runs here train on the CPU", remedy)
        return
    try:
        gpus = nvml.list_gpus(COMMAND_DEADLINE_S)
    except NvmlError as error:
        yield failure(f"the GPUs cannot be used: {error}", _EXCLUDE)
        return
    names = Counter(gpu.name for gpu in gpus)
    # Ranks of a run may be on some GPUs of a node only.
    counts = "; ".join(f"{'' if node.plan else f'{count} x '}{name}" for name, count in sorted(names.items()))
    yield ok(counts, must_match=True)
    if len(gpus) < node.num_ranks:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        seen = f"there are fewer GPUs than ranks: {len(gpus)} found, {node.num_ranks} needed; CUDA_VISIBLE_DEVICES={visible}"
        yield failure(seen, f"{section.gpus_remedy}, or set cluster.ranks_per_node to the number of GPUs")
    planned = section.gpu_type
    if others := sorted(name for name in names if planned and lookup(name) != lookup(planned)):
        remedy = f"set cluster.gpu_type to the actual type, or {section.gpu_kind_remedy}"
        yield failure(f"the GPUs are not of the planned kind: {', '.join(others)} found, {planned} planned", remedy)
    for gpu in gpus:
        if gpu.ecc_errors:
            seen = f"a GPU had memory errors that could not be corrected: {gpu.name} {gpu.uuid}: {gpu.ecc_errors} errors"
            yield failure(seen, "exclude this node and ask the administrators to reset the GPU")
        if gpu.slowdowns:
            seen = f"the clocks of a GPU are lowered before the run uses it: {gpu.name} {gpu.uuid}: {' and '.join(gpu.slowdowns)}"
            yield warning(seen, "check the node's cooling and power supply, or exclude this node")
    yield from _check_memory(gpus, node)


def _check_memory(gpus: list[GpuInfo], node: CheckedNode) -> Iterator[CheckResult]:
    """Yield a failure for each foreign process that holds GPU memory, such as leftovers of an earlier job."""
    this, deadline = psutil.Process(), time.monotonic() + GRACE_S
    own_pids = {process.pid for process in (this, *this.children(recursive=True))}
    others = [
        (gpu.uuid, pid, used_mib)
        for gpu in gpus
        for pid, used_mib in gpu.processes
        if pid not in own_pids and not _SERVICES.search(_describe_process(pid))
    ]
    while others and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
        gpus = nvml.list_gpus(COMMAND_DEADLINE_S)
        # A local run does not wait for its check: others that appear meanwhile may be its ranks.
        present = {pid for gpu in gpus for pid, _ in gpu.processes}
        others = [other for other in others if other[1] in present]
    for uuid, pid, used_mib in others:
        held = "memory" if used_mib is None else f"{used_mib} MiB"
        seen = f"a process outside this run holds GPU memory: {_describe_process(pid)}: {held} of {uuid}"
        yield failure(seen, f"end it on the node with: kill {pid}; or exclude this node")
    for gpu in gpus if node.plan is None else ():
        if gpu.free_gib is None or not gpu.memory_gib:
            continue
        seen = f"{gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB free on {gpu.uuid}"
        if not gpu.processes and 1 - gpu.free_gib / gpu.memory_gib > _MAX_USED_FRACTION:
            seen += ": the rest is held, but the driver lists no process, which may be in another container"
            yield warning(seen, "find it on the host with nvidia-smi, and end it")
        else:
            yield ok(seen)


def _describe_process(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"process {pid} ({process.name()}) of {process.username()}"
    except psutil.Error:
        # It has ended, or belongs to another container.
        return f"process {pid} of an unknown user"


def check_torch(node: CheckedNode) -> Iterator[CheckResult]:
    """Import torch, and run a kernel on every GPU that the driver lists."""
    output, problem = run_python(["-m", __spec__.name, "torch", _choose_device()], COMPUTE_DEADLINE_S)
    if problem:
        remedy = (
            "compare nvidia-smi's CUDA version with torch's, and install the build that fits: https://pytorch.org/get-started"
        )
        yield failure(f"torch cannot be used: {problem}", remedy)
    else:
        yield ok(output, must_match=True)


def check_all_reduce(node: CheckedNode) -> Iterator[CheckResult]:
    """All-reduce over all GPUs of this machine with NCCL, or over two processes with gloo if there is no GPU."""
    device = _choose_device()
    loopback = {"GLOO_SOCKET_IFNAME": LOOPBACK.interface, "NCCL_SOCKET_IFNAME": f"={LOOPBACK.interface}", "OMP_NUM_THREADS": "1"}
    output, problem = run_python(["-m", __spec__.name, "all-reduce", device], COMPUTE_DEADLINE_S, {**os.environ, **loopback})
    if problem:
        remedy = "repeat it with NCCL_DEBUG=INFO; check /dev/shm, nvidia-smi topo -m, and that no firewall closes loopback"
        yield failure(f"it failed: {problem}", remedy)
        return
    num_ranks, bandwidth = int(output.split()[0]), float(output.split()[1])
    seen = f"NCCL over {num_ranks} GPUs" if device == "cuda" else f"gloo over {num_ranks} processes on the CPU"
    if device == "cuda" and num_ranks > 1 and bandwidth < _SLOW_GB_PER_S:
        remedy = "look at nvidia-smi topo -m: GPUs without NVLink should share a PCIe switch; unset NCCL_P2P_DISABLE"
        yield warning(f"{seen}: {bandwidth:.2f} GB/s, which is slow: training will wait for it", remedy)
    else:
        yield ok(f"{seen}: {bandwidth:.2f} GB/s" if num_ranks > 1 else "NCCL starts on the GPU")


def _choose_device() -> str:
    return "cuda" if may_use_gpus() else "cpu"


# The code below runs in the separate process.


def _try_torch(device: str) -> str:
    import torch

    if device == "cpu":
        return f"torch {torch.__version__}"
    # Says why, if torch cannot use the driver.
    torch.cuda.init()
    for i in range(torch.cuda.device_count()):
        # The first kernel fails if torch has none for this GPU's compute capability.
        torch.ones(2, device=f"cuda:{i}").sum().item()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    version = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, NCCL {nccl}"
    return f"{version}, a kernel ran on each of {torch.cuda.device_count()} GPUs"


def _run_all_reduce(device: str) -> str:
    import torch

    # `run_python` has made it for this process.
    folder = tempfile.gettempdir()
    num_ranks = torch.cuda.device_count() if device == "cuda" else _RANKS_ON_CPU
    torch.multiprocessing.spawn(_run_rank, (device, num_ranks, folder), nprocs=num_ranks)
    with open(f"{folder}/bandwidth") as file:
        return f"{num_ranks} {file.read()}"


def _run_rank(rank: int, device: str, num_ranks: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from launcher.distributed import measure_bus_bandwidth

    of_rank = torch.device("cpu") if device == "cpu" else torch.device("cuda", rank)
    if device == "cuda":
        torch.cuda.set_device(of_rank)
    store, timeout = dist.FileStore(f"{folder}/store", num_ranks), timedelta(seconds=COMPUTE_DEADLINE_S)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    bandwidth = measure_bus_bandwidth(of_rank)
    if rank == 0:
        with open(f"{folder}/bandwidth", "w") as file:
            file.write(str(bandwidth))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        print(_try_torch(sys.argv[2]) if sys.argv[1] == "torch" else _run_all_reduce(sys.argv[2]))
    # torch raises many types of exceptions; the first line of a message, or the last of a rank's traceback, names the problem.
    except Exception as error:
        lines = describe(error).strip().splitlines()
        sys.exit(lines[-1 if sys.argv[1] == "all-reduce" else 0])
