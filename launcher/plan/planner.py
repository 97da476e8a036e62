"""`plan(config, facts) -> LaunchPlan`: every decision of a run, made without touching anything."""

from __future__ import annotations

import hashlib
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.errors import ConfigError
from launcher.plan import batch, deepspeed, memory
from launcher.plan.gpus import GPUS, lookup
from launcher.plan.launch_plan import Facts, LaunchPlan, Limits, Topology
from launcher.plan.run_dir import default_name

CPU_RANKS = 2


def plan(config: RunConfig, facts: Facts) -> LaunchPlan:
    """Decide topology, batch, ZeRO-3 settings, memory and limits. Pure.

    Raises:
        ConfigError: where the settings cannot be satisfied on this topology.
    """
    topology = _topology(config, facts)
    split = batch.split(config.train, config.data, topology.world_size, topology.device, facts.data)
    run_name = config.run.name or default_name(config, facts.provenance.created_at)
    run_dir = Path(facts.working_dir) / Path(config.run.root).expanduser() / run_name
    return LaunchPlan(
        run_name=run_name,
        run_dir=str(run_dir),
        wandb_id=hashlib.blake2b(f"{run_dir}|{facts.provenance.created_at}".encode(), digest_size=6).hexdigest(),
        config=config,
        topology=topology,
        batch=split,
        deepspeed=deepspeed.render(config.deepspeed, config.model, config.train, split, topology, facts.model),
        memory=memory.estimate(
            facts.model.num_params,
            config.model.dtype,
            split.accumulation,
            config.deepspeed,
            topology,
            _device_gib(config, facts),
        ),
        checkpoint_bytes=memory.checkpoint_bytes(facts.model.num_params),
        limits=Limits(max_seconds=_max_seconds(config, topology.world_size)),
        model=facts.model,
        data=facts.data,
        provenance=facts.provenance,
    )


def _topology(config: RunConfig, facts: Facts) -> Topology:
    cluster = config.cluster
    on_gpu = cluster.gpu_type is not None or facts.device.kind == "cuda"
    ranks = cluster.ranks_per_node or (facts.device.count if facts.device.kind == "cuda" else CPU_RANKS)
    hpz = memory.hpz_ranks(config.deepspeed, ranks)
    world_size = cluster.nodes * ranks
    if world_size % hpz:
        raise ConfigError(
            f"deepspeed.hpz_partition_size={hpz} does not divide the {world_size} ranks",
            where="deepspeed.hpz_partition_size",
            value=str(hpz),
            remedy=f"set it to the ranks of one node ({ranks}), to 'node', or to 1",
        )
    return Topology(
        nodes=cluster.nodes,
        ranks_per_node=ranks,
        world_size=world_size,
        device="cuda" if on_gpu else "cpu",
        backend="nccl" if on_gpu else "gloo",
    )


def _device_gib(config: RunConfig, facts: Facts) -> float | None:
    if config.cluster.gpu_type is None:
        return facts.device.memory_gib
    gpu = lookup(config.cluster.gpu_type)
    if gpu is None:
        raise ConfigError(
            f"cluster.gpu_type={config.cluster.gpu_type} is not in the table of GPU types",
            where="cluster.gpu_type",
            value=config.cluster.gpu_type,
            remedy=f"choose one of {', '.join(GPUS)}, or leave it unset to use this machine's",
        )
    return gpu.memory_gib


def _max_seconds(config: RunConfig, world_size: int) -> float | None:
    limits = []
    if config.run.max_hours is not None:
        limits.append(config.run.max_hours * 3600)
    if config.run.max_usd is not None and config.cluster.price_per_gpu_hour is not None:
        limits.append(config.run.max_usd / (config.cluster.price_per_gpu_hour * world_size) * 3600)
    return min(limits, default=None)
