"""An all-reduce over this machine's devices, between real processes, as the ranks do it before the model loads.

`python -m launcher.worker.doctor.all_reduce DEVICE RANK RANKS FILE` is one of these processes; rank 0 prints the bandwidth.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.clusters.check_results import CheckResult, failure, ok, warning
from launcher.clusters.network import LOOPBACK
from launcher.config.schema import RunConfig
from launcher.hardware import may_use_gpus
from launcher.worker.doctor.python_process import kill, start_python, wait_for
from launcher.worker.doctor.torch_build import read_torch_build

DEADLINE_S = 180.0
_RANKS_ON_CPU = 2
# PCIe 3.0 reaches twice this between two GPUs.
_SLOW_GB_PER_S = 5.0


def check_all_reduce(config: RunConfig) -> Iterator[CheckResult]:
    """All-reduce over all GPUs of this machine with NCCL, or over two processes with gloo if there is no GPU."""
    build = read_torch_build()
    if isinstance(build, str) or (may_use_gpus() and build.cuda and not build.num_gpus):
        # The torch check reports this.
        return
    device, backend = ("cuda", "NCCL") if build.num_gpus else ("cpu", "gloo")
    num_ranks = build.num_gpus or _RANKS_ON_CPU
    what = f"{backend} over {num_ranks} {'GPUs' if device == 'cuda' else 'processes on the CPU'}"
    with tempfile.TemporaryDirectory(prefix="launcher-doctor-") as folder:
        bandwidth, reason = _run_ranks(device, num_ranks, Path(folder))
    if reason:
        remedy = "repeat it with NCCL_DEBUG=INFO; check /dev/shm, nvidia-smi topo -m, and that no firewall closes loopback"
        yield failure(f"{what} failed: {reason}", remedy)
    elif device == "cuda" and num_ranks > 1 and bandwidth < _SLOW_GB_PER_S:
        seen = f"{what}: {bandwidth:.2f} GB/s, which is slow: training will wait for it"
        yield warning(seen, "look at nvidia-smi topo -m: GPUs without NVLink should share a PCIe switch; unset NCCL_P2P_DISABLE")
    else:
        yield ok(f"{what}: {bandwidth:.2f} GB/s" if num_ranks > 1 else f"{backend} starts on the GPU")


def _run_ranks(device: str, num_ranks: int, folder: Path) -> tuple[float, str]:
    """Return the bandwidth in GB/s, and why the ranks failed (empty if they did not)."""
    variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK.interface, "NCCL_SOCKET_IFNAME": f"={LOOPBACK.interface}"}
    environ = {**os.environ, **variables}
    arguments = ["-m", __spec__.name, device]
    until = time.monotonic() + DEADLINE_S
    ranks = [start_python([*arguments, str(rank), str(num_ranks), str(folder / "store")], environ) for rank in range(num_ranks)]
    try:
        finished = [wait_for(process, until - time.monotonic()) for process in ranks]
    finally:
        for process in ranks:
            kill(process)
    # A rank that waited for a failed rank reports at most a lost connection, so its last output is less relevant.
    reasons = [f"rank {rank}: {each.reason}" for rank, each in enumerate(finished) if each.reason]
    if reasons:
        return 0.0, next((reason for reason in reasons if "did not end" not in reason), reasons[0])
    return float(finished[0].output.strip().splitlines()[-1]), ""


def _main(device: str, rank: int, num_ranks: int, file: str) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from launcher.train.monitoring.bandwidth import measure_bus_bandwidth

    of_rank = torch.device("cpu") if device == "cpu" else torch.device("cuda", rank)
    if device == "cuda":
        torch.cuda.set_device(of_rank)
    store = dist.FileStore(file, num_ranks)
    backend, timeout = ("nccl" if device == "cuda" else "gloo"), timedelta(seconds=DEADLINE_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    bandwidth = measure_bus_bandwidth(of_rank)
    if rank == 0:
        print(bandwidth, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
