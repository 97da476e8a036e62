"""Builds the ZeRO-3 engine for a plan: process group, partitioned model, optimizer, and locks for builds of C++ extensions."""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import cpp_extension

from launcher.distributed import RankInfo, open_store
from launcher.errors import RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.security.folders import make_private_folder
from launcher.tracking.progress import MakeProgress, ignore_progress
from launcher.train.model import CausalLMLoss, build_model
from launcher.train.optim import build_optimizer


def join_process_group(plan: LaunchPlan, rank_info: RankInfo) -> torch.device:
    """Join the process group and return this rank's device. Collective."""
    import deepspeed

    lock_builds()
    skip_unused_kernels()
    warnings.filterwarnings("ignore", message=".*_(all_gather|reduce_scatter)_base.*|.*(all_gather_into|reduce_scatter)_tensor.*")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if plan.topology.device == "cuda":
        device = torch.device("cuda", rank_info.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")

    def meet_ranks(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
        """Do as torch's env://, but let the store listen only on MASTER_ADDR."""
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        yield open_store(address, port, is_server=rank == 0, num_members=world_size, timeout=timeout), rank, world_size

    with suppress(RuntimeError):  # already registered
        dist.register_rendezvous_handler("launcher", meet_ranks)
    deepspeed.init_distributed(
        dist_backend=plan.topology.backend,
        timeout=timedelta(minutes=plan.config.cluster.timeout_minutes),
        init_method="launcher://",
        verbose=False,
    )
    return device


def build_engine(
    plan: LaunchPlan,
    rank_info: RankInfo,
    make_progress: MakeProgress = ignore_progress,
    has_checkpoint: bool = False,
    on_model: Callable[[CausalLMLoss], None] = lambda model: None,
) -> tuple[Any, CausalLMLoss]:
    """Build a DeepSpeed engine around the model, with weights loaded and partitioned. Collective.

    `make_progress` reports the loading of the weights on rank 0. With `has_checkpoint`, the weights have no values until a
    checkpoint is loaded into the engine. `on_model` gets the partitioned model before DeepSpeed registers its hooks.

    Raises:
        RunError: if the plan puts states on an NVMe disk that this node does not have.
        ConfigError: if the architecture cannot be trained, weights are missing, or another user owns the folder on NVMe.
    """
    import deepspeed

    if (folder := plan.nvme_folder) is not None:
        # DeepSpeed would create the folder itself, and fill the system disk if nothing is mounted there.
        if not folder.parent.is_dir():
            raise RunError(
                "this node does not have the folder for states on NVMe",
                where="deepspeed.nvme_path",
                value=str(folder.parent),
                remedy="mount a local NVMe disk there, or use deepspeed=zero3_offload",
            )
        # It is emptied: earlier attempts may have had more ranks.
        if rank_info.local_rank == 0:
            make_private_folder(folder, "deepspeed.nvme_path")
        dist.barrier()
    with _partition_model(plan, make_progress, has_checkpoint) as model:
        on_model(model)
        optimizer = build_optimizer(model.parameters_by_name().values(), plan.config.optim, plan.config.deepspeed)
        import_muon()
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=plan.deepspeed)
    return engine, model


def build_inference_engine(plan: LaunchPlan) -> tuple[Any, CausalLMLoss]:
    """Build a DeepSpeed engine that evaluates as the training engine does, but without an optimizer. Collective.

    Raises:
        ConfigError: if the architecture cannot be trained, or weights are missing.
    """
    import deepspeed

    with _partition_model(plan, ignore_progress, trains=False) as model:
        import_muon()
        engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=plan.deepspeed)
    return engine, model


@contextmanager
def _partition_model(
    plan: LaunchPlan, make_progress: MakeProgress, has_checkpoint: bool = False, trains: bool = True
) -> Iterator[CausalLMLoss]:
    """Build the model of a plan with partitioned weights, and keep its partitioning alive within the block."""
    from transformers import set_seed
    from transformers.integrations import HfDeepSpeedConfig

    set_seed(plan.config.run.seed)
    # transformers holds only a weak reference to this object; weights are partitioned as they load while it is alive.
    partitioning = HfDeepSpeedConfig(plan.deepspeed)
    yield build_model(
        plan.config.model,
        plan.model,
        plan.topology.device,
        plan.loss_chunk_tokens,
        packing=plan.config.data.packing,
        make_progress=make_progress,
        has_checkpoint=has_checkpoint,
        checkpointing=plan.checkpointing,
        uses_liger=plan.liger,
        compiles=trains and plan.config.model.compile,
    )
    del partitioning


def import_muon() -> None:
    """Import DeepSpeed's Muon without torch.compile, which it applies to three functions that are never called here.

    DeepSpeed compares each optimizer's type with Muon's. Loading the compiler would take a fifth of a rank's start-up time.
    """
    compiler, torch.compile = torch.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compiler


def leave_process_group() -> None:
    """Leave the process group once all ranks have called this function. Collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class LockedBaton:
    """Replacement for torch's FileBaton that locks the file instead of testing whether it exists.

    torch marks a build in progress with a file in the user's cache (torch/utils/file_baton.py). A process that is killed during a
    build leaves the file behind, and every later process waits for it forever. The operating system releases a lock when the
    process ends.
    """

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None) -> None:
        self._path, self._wait_s = lock_file_path, wait_seconds
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Return True if this process may build."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(self._path).st_ino:
                self._descriptor = descriptor
                return True
        except (BlockingIOError, FileNotFoundError):
            # Another process holds the lock, or has just finished and deleted the file.
            pass
        os.close(descriptor)
        return False

    def wait(self) -> None:
        """Wait until the building process has ended, successfully or not."""
        while not self.try_acquire():
            time.sleep(self._wait_s)
        self.release()

    def release(self) -> None:
        """Release the lock and delete the file that other programs wait for."""
        # A program that uses torch's own baton, and built at the same time, may have deleted it.
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_builds() -> None:
    """Make torch use these locks in this process. Call this before DeepSpeed builds or loads an extension."""
    cpp_extension.FileBaton = LockedBaton


def skip_unused_kernels() -> None:
    """Keep DeepSpeed from compiling kernels that no run uses. Call this before ranks meet through DeepSpeed.

    On CPUs it compiles a kernel for tensor parallelism whenever a process group is created, which takes a minute without a cache.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
