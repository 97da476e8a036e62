"""Decide everything about a run: `plan(config, facts) -> LaunchPlan`. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.schema import RunConfig
from launcher.errors import ConfigError, Problem
from launcher.plan import plan_checks
from launcher.plan.architecture import architecture_problems
from launcher.plan.checkpoints import checkpoint_bytes, plan_saving
from launcher.plan.gpu_types import GpuType, Price, lookup, typical_price
from launcher.plan.launch_plan import Facts, LaunchPlan, Limits, Topology
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import default_name
from launcher.plan.sizing.combinations import (
    CHOSEN_BY_PLAN,
    CombinationEstimate,
    SizingInputs,
    build_combination,
    choose_combination,
    estimate_combination,
    find_nearest_fits,
)
from launcher.plan.sizing.layers import may_lack_liger, uses_liger
from launcher.plan.sizing.memory import num_hpz_ranks
from launcher.plan.sizing.step_time import Rates, StepTime
from launcher.plan.steps import split_batch

CPU_RANKS = 2


def plan(config: RunConfig, facts: Facts) -> LaunchPlan:
    """Decide topology, batch, ZeRO-3 settings, memory and limits. Pure.

    Raises:
        ConfigError: with all settings that this topology cannot satisfy.
    """
    if config.model.dtype == "auto":
        # facts.resolve_settings has chosen fp32 if bf16 is slow.
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})
    topology = choose_topology(config, facts)
    problems = [*plan_checks.find_topology_refusals(config, facts.device, topology)]
    problems += architecture_problems(facts.model, config.data.packing)
    problems += plan_checks.find_refusals(config, facts.model, facts.data)
    gpu_name = config.cluster.gpu_type or facts.device.name
    try:
        split_batch(config.train, config.data, topology.data_ranks, topology.device, facts.data)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    run_name = config.run.name or default_name(config, facts.provenance.created_at, facts.provenance.run_file)
    run_dir = run_dir_of(config, run_name, facts.working_dir, facts.home_dir)
    # The main memory of this machine only counts if the plan is for machines of the same kind.
    host_memory_gib = facts.device.host_memory_gib if facts.device.kind == topology.device else None
    liger = uses_liger(config, facts.model, topology.device, facts.provenance.packages)
    inputs = SizingInputs(
        config,
        facts.model,
        facts.data,
        topology,
        lookup(gpu_name),
        device_gib(config, facts),
        liger and not may_lack_liger(config),
        _name_nvme_folder(config, run_name, run_dir),
    )
    hours, usd, own_price = config.run.max_hours, config.run.max_usd, config.cluster.price_per_gpu_hour
    # Of a GPU, or of a rank on CPUs.
    price = None if own_price is None else Price(usd_per_gpu_hour=own_price)
    if price is None and topology.device != "cpu":
        price = typical_price(gpu_name)
    planned = LaunchPlan(
        run_name=run_name,
        run_dir=str(run_dir),
        wandb_id=hashlib.blake2b(f"{run_dir}|{facts.provenance.created_at}".encode(), digest_size=6).hexdigest(),
        config=config,
        **_plan_by_ranks(inputs, gpu_name, host_memory_gib),
        liger=liger,
        checkpoint_bytes=checkpoint_bytes(facts.model.num_params, OPTIMIZERS[config.optim.name]),
        limits=Limits(
            max_seconds=None if hours is None else hours * 3600,
            # At the current price; past attempts of a resumed run keep their own prices.
            max_gpu_seconds=None if usd is None or own_price is None else usd / own_price * 3600,
        ),
        price=price,
        model=facts.model,
        data=facts.data,
        eval_sets=facts.eval_sets,
        provenance=facts.provenance,
        lineage=facts.lineage,
    )
    if problems := list(_check_memory(planned)):
        raise ConfigError(problems)
    return planned


def fit_nodes(planned: LaunchPlan, num_nodes: int) -> LaunchPlan:
    """Return the plan on the largest number of nodes, up to `num_nodes`, whose ranks the global batch divides over. Pure.

    Raises:
        ConfigError: if there is no such number.
    """
    for nodes in range(num_nodes, 0, -1):
        if nodes == planned.topology.nodes:
            return planned
        with suppress(ConfigError):
            return resize_plan(planned, nodes * planned.topology.ranks_per_node, planned.topology.ranks_per_node)
    raise ConfigError(
        f"the global batch cannot be split evenly over the ranks of any number of nodes up to {num_nodes}",
        where="train.global_batch_size",
        value=str(planned.batch.global_batch_size),
        remedy="leave train.micro_batch_size and deepspeed.hpz_partition_size unset, or change the batch",
    )


def plan_fewest_nodes(planned: LaunchPlan) -> LaunchPlan | None:
    """Return the plan of an elastic run on its minimum number of nodes; None for a run of one size."""
    num_nodes = planned.config.cluster.fewest_nodes
    return None if num_nodes in (None, planned.topology.nodes) else fit_nodes(planned, num_nodes)


def resize_plan(planned: LaunchPlan, world_size: int, ranks_per_node: int) -> LaunchPlan:
    """Return the plan of the same run on another number of ranks: each step has the same rows, split differently. Pure.

    Raises:
        ConfigError: if the global batch or an hpZ partition does not divide over the ranks.
    """
    config, nodes = planned.config, -(-world_size // ranks_per_node)
    sizes = {"nodes": nodes, "ranks_per_node": ranks_per_node, "world_size": world_size}
    topology = planned.topology.model_copy(update=sizes)
    if problems := list(plan_checks.check_hpz(config, topology)):
        raise ConfigError(problems)
    inputs = replace(sizing_inputs(planned), topology=topology)
    parts = _plan_by_ranks(inputs, planned.gpu_name, planned.memory.node_gib)
    if not planned.saving.background:
        parts["saving"] = planned.saving
    return planned.model_copy(update=parts)


def _plan_by_ranks(inputs: SizingInputs, gpu_name: str, host_memory_gib: float | None) -> dict[str, Any]:
    """Return the parts of a plan that depend on the number of ranks."""
    config, topology = inputs.config, inputs.topology
    chosen = choose_combination(inputs)
    states = chosen.memory.model_copy(update={"node_gib": host_memory_gib})
    optimizer = OPTIMIZERS[config.optim.name]
    return {
        "topology": topology,
        "gpu_name": gpu_name if topology.device == "cuda" else "",
        "batch": chosen.batch,
        "checkpointing": chosen.combination.checkpointing,
        "loss_chunk_tokens": chosen.chunk_tokens,
        "peak": chosen.peak,
        "deepspeed": chosen.deepspeed,
        "memory": states,
        "saving": plan_saving(
            inputs.model.num_params, config.checkpoint.async_save, optimizer, config.deepspeed, states, topology, host_memory_gib
        ),
    }


def sizing_inputs(planned: LaunchPlan) -> SizingInputs:
    """Return what the estimates for combinations of a plan's settings depend on."""
    return SizingInputs(
        planned.config,
        planned.model,
        planned.data,
        planned.topology,
        lookup(planned.gpu_name),
        planned.memory.device_gib,
        planned.liger and not may_lack_liger(planned.config),
        _name_nvme_folder(planned.config, planned.run_name, Path(planned.run_dir)),
    )


def planned_tokens_per_sec(planned: LaunchPlan, gpu: GpuType | None = None) -> float | None:
    """Return the tokens per second over all ranks from the time model; None on CPUs, without packing, or if unknown.

    `gpu` replaces the row of the plan's GPUs.
    """
    if planned.topology.device != "cuda":
        return None
    step = planned_step(planned, gpu)
    return None if step is None else planned.batch.expected_tokens / step.total_s


def planned_step(planned: LaunchPlan, gpu: GpuType | None = None, rates: Rates | None = None) -> StepTime | None:
    """Return the time of a step from the time model; None without packing, or if unknown.

    `gpu` replaces the row of the plan's GPUs, and `rates` the rates that follow from it; CPUs need `rates`.
    """
    if not planned.config.data.packing:
        return None
    inputs = replace(sizing_inputs(planned), rates=rates)
    return _estimate_planned(planned, inputs if gpu is None else replace(inputs, gpu=gpu)).step


def as_run(planned: LaunchPlan, has_liger: bool) -> LaunchPlan:
    """Return the plan with the speed and the peak predicted for its ranks, which have found out whether Liger works. Pure.

    The ranks may lack a Liger that was planned, and the peak of a plan whose ranks decide is for the case without it.
    """
    config = planned.config.model_copy(update={"model": planned.config.model.model_copy(update={"liger": has_liger})})
    decided = planned.model_copy(update={"config": config, "liger": has_liger})
    return decided.model_copy(update={"peak": _estimate_planned(decided, sizing_inputs(decided)).peak})


def _estimate_planned(planned: LaunchPlan, inputs: SizingInputs) -> CombinationEstimate:
    """Return the estimate of the combination that a plan has chosen, for its sizing inputs or changed ones."""
    inputs = replace(inputs, chunk_tokens=planned.loss_chunk_tokens)
    combination = build_combination(inputs, planned.batch.micro_batch_size, planned.checkpointing)
    return estimate_combination(inputs, combination)


def choose_topology(config: RunConfig, facts: Facts) -> Topology:
    """Return the nodes and ranks of a run: from its cluster settings, or from the node that `facts` describe."""
    cluster, device = config.cluster, facts.device
    on_gpu = cluster.gpu_type is not None or device.kind == "cuda"
    ranks = cluster.ranks_per_node or (device.count if device.kind == "cuda" else CPU_RANKS)
    world_size = cluster.nodes * ranks
    ranks = min(ranks, world_size)
    return Topology(
        nodes=-(-world_size // ranks),
        ranks_per_node=ranks,
        world_size=world_size,
        device="cuda" if on_gpu else "cpu",
        backend="nccl" if on_gpu else "gloo",
    )


def _check_memory(planned: LaunchPlan) -> Iterator[Problem]:
    """Yield problems with model states that exceed a GPU's memory: on all workers, or on an elastic run's minimum number."""
    cluster, states = planned.config.cluster, planned.config.deepspeed
    if planned.topology.device != "cuda" or cluster.has_unknown_gpus:
        return
    offload = "deepspeed.offload_params=cpu" if states.offload_optimizer != "none" else "deepspeed=zero3_offload"
    if num_hpz_ranks(states, planned.topology.ranks_per_node) > 1:
        offload += ", deepspeed.hpz_partition_size=1"
    if too_large := _describe_excess(planned):
        topology = planned.topology
        price = None if planned.price is None else planned.price.usd_per_gpu_hour
        nearest = find_nearest_fits(sizing_inputs(planned), price)
        remedy = f"use more ranks, {offload}, or name larger GPUs with cluster.gpu_type"
        if nearest and nearest[0].startswith(CHOSEN_BY_PLAN):
            remedy = "leave to the plan what it can choose, or change the machines"
        if nearest:
            remedy += f". Nearest that fit: {'; '.join(nearest)}"
        size = f"{format_count(topology.nodes, 'node')} of {format_count(topology.ranks_per_node, 'rank')}"
        yield Problem(too_large, where="cluster", value=size, remedy=remedy)
        return
    smallest = plan_fewest_nodes(planned)
    if smallest is not None and (too_large := _describe_excess(smallest)):
        fewest_nodes = planned.config.cluster.fewest_nodes
        yield Problem(
            f"cluster.min_nodes={fewest_nodes}: {too_large}",
            where="cluster.min_nodes",
            value=str(fewest_nodes),
            remedy=f"raise it, or use {offload}",
        )


def _describe_excess(planned: LaunchPlan) -> str:
    """Return a message if a rank's states, or its tensors at their peak, exceed a GPU; empty if they fit or if that is unknown.

    The memory for CUDA, NCCL and fragmentation is an assumption. A plan that exceeds a GPU only with it gets a note instead.
    """
    states, peak, ranks = planned.memory, planned.peak, planned.topology.world_size
    if states.device_gib is None:
        return ""
    over = f"over {format_count(ranks, 'rank')}"
    if states.per_rank_gib > states.device_gib:
        return f"model states {over} need {states.per_rank_gib:.0f} GiB per GPU, and a GPU has {states.device_gib:.0f}"
    if peak.tensors_gib <= states.device_gib:
        return ""
    stage = peak.largest
    return (
        f"the {stage.name} stage needs {peak.tensors_gib:.0f} GiB per GPU {over}, and a GPU has {states.device_gib:.0f}: model "
        f"states {peak.states_gib:.0f}, activations {stage.activations_gib:.0f}, everything else "
        f"{peak.tensors_gib - peak.states_gib - stage.activations_gib:.0f}"
    )


def _name_nvme_folder(config: RunConfig, run_name: str, run_dir: Path) -> str | None:
    """Return a folder for this run only, the same in every attempt: the next attempt overwrites what a killed attempt left."""
    if config.deepspeed.nvme_path is None:
        return None
    tag = hashlib.blake2b(str(run_dir).encode(), digest_size=4).hexdigest()
    return f"{config.deepspeed.nvme_path}/{run_name}-{tag}"


def run_dir_of(config: RunConfig, name: str, working_dir: str, home_dir: str) -> Path:
    """Return the directory of the run with this name."""
    root = config.run.root
    return Path(working_dir) / (home_dir + root[1:] if root == "~" or root.startswith("~/") else root) / name


def device_gib(config: RunConfig, facts: Facts) -> float | None:
    gpu = lookup(config.cluster.gpu_type or "")
    return gpu.memory_gib if gpu is not None else facts.device.memory_gib
