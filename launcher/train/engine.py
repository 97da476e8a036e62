"""From a plan to a running ZeRO-3 engine: process group, partitioned model, optimizer."""

from __future__ import annotations

import logging
import shutil
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launcher.distributed import RankInfo
from launcher.errors import RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.train.jit_build_lock import lock_builds
from launcher.train.model import CausalLMLoss, build_model
from launcher.train.optim import build_optimizer


def join(plan: LaunchPlan, rank_info: RankInfo) -> torch.device:
    """Join the process group and return this rank's device."""
    import deepspeed

    lock_builds()
    warnings.filterwarnings("ignore", message=".*_(all_gather|reduce_scatter)_base.*|.*(all_gather_into|reduce_scatter)_tensor.*")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if plan.topology.device == "cuda":
        device = torch.device("cuda", rank_info.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    deepspeed.init_distributed(
        dist_backend=plan.topology.backend,
        timeout=timedelta(minutes=plan.config.cluster.timeout_minutes),
        verbose=False,
    )
    return device


def build_engine(plan: LaunchPlan, rank_info: RankInfo) -> tuple[Any, CausalLMLoss]:
    """A DeepSpeed engine around the model, with weights loaded and partitioned. Collective.

    Raises:
        RunError: where states are to lie on an NVMe disk that this node does not have.
    """
    import deepspeed
    from transformers import set_seed
    from transformers.integrations import HfDeepSpeedConfig

    set_seed(plan.config.run.seed)
    # transformers looks at this object through a weak reference: while it lives, weights are partitioned as they load.
    partitioned = HfDeepSpeedConfig(plan.deepspeed)
    _clear_nvme(plan, rank_info)
    model = build_model(plan.config.model, plan.model, plan.topology.device, plan.config.train.loss_chunk_tokens)
    optimizer = build_optimizer(model.parameters_by_name().values(), plan.config.optim, plan.config.deepspeed)
    import_muon()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=plan.deepspeed)
    del partitioned
    return engine, model


def import_muon() -> None:
    """DeepSpeed compares our optimizer's type with its Muon, whose import wraps three functions in torch.compile: that alone
    loads the whole compiler, a fifth of a rank's start. Nothing here calls them.
    """
    compiler, torch.compile = torch.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compiler


def leave() -> None:
    """Leave the process group after all ranks have come this far."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _clear_nvme(plan: LaunchPlan, rank_info: RankInfo) -> None:
    """Remove what a killed attempt has left, perhaps of more ranks than there are now."""
    folder = plan.nvme_folder
    if folder is None:
        return
    # DeepSpeed would make the folder wherever it is, and fill the system's disk where nothing is mounted there.
    if not folder.parent.is_dir():
        raise RunError(
            "this node has no such folder for states on NVMe",
            where="deepspeed.nvme_path",
            value=str(folder.parent),
            remedy="mount a local NVMe disk there, or use deepspeed=zero3_offload",
        )
    if rank_info.local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
