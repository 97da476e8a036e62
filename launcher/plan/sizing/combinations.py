"""Combinations of micro-batch, checkpointing, kernels, hpZ and offload that a run could use, with their peak memory and speed.

The plan takes the fastest combination that the settings allow and that fits. The others show what an override would gain, and
which changes make a run fit that is too large for its GPUs. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from launcher.config.schema import RunConfig
from launcher.errors import ConfigError
from launcher.plan import deepspeed as deepspeed_json
from launcher.plan.gpu_types import GPUS, GpuType
from launcher.plan.launch_plan import LOSS_CHUNK_TOKENS, Batch, DataFacts, ModelFacts, PeakMemory, Topology
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.sizing import memory
from launcher.plan.sizing.kernels import (
    ALL,
    AUTO,
    NONE,
    Kernels,
    attention_kernel,
    checkpointed_layers,
    has_liger_kernels,
    interval,
)
from launcher.plan.sizing.memory import Pass, Sharding, estimate_peak
from launcher.plan.sizing.step_time import Rates, StepTime, gpu_rates, predict_step
from launcher.plan.steps import list_divisors, split_batch

# A combination fits up to USABLE_SHARE of a GPU's memory; up to PREFERRED_SHARE is preferred until a GPU of the type is measured.
USABLE_SHARE, PREFERRED_SHARE = 0.95, 0.90
# Combinations this close to the fastest count as equal; the one with the smallest peak is chosen.
_AS_FAST = 0.98
# Largest number of tokens per forward pass to try: beyond it, a step is not faster.
_MOST_TOKENS = 32_768
_CHECKPOINTING = (NONE, "every 4", "every 3", "every 2", ALL)
# From this many tokens per forward pass, or FLOPs per forward and backward pass, a GPU does not wait for Python.
_BUSY_TOKENS, _MOST_BUSY_TOKENS, _BUSY_FLOPS = 8192, 131_072, 1.4e14
# Numbers of tokens per chunk of logits to try.
_CHUNK_TOKENS = (4096, 2048, 1024, 512, 256)
# Values with which the plan chooses the micro-batch and the recomputed layers.
CHOSEN_BY_PLAN = _MICRO_BATCH, _LAYERS = ("train.micro_batch_size=null", "model.activation_checkpointing=auto")
_NODE_FACTORS, _SHORTEST_ROW = (2, 4, 8, 16, 32), 1024


@dataclass(frozen=True)
class Combination:
    """Settings that decide memory and speed. Layers that are `compiled` are also gathered as a whole."""

    micro_batch_size: int
    checkpointing: str
    liger: bool
    compiled: bool
    hpz_ranks: int
    offload_optimizer: str
    offload_params: str


@dataclass(frozen=True)
class Considered:
    """A combination with its peak memory, the predicted step and the tokens per second over all ranks; None if unknown.

    `is_allowed` is whether the settings leave it to the plan. `host_gib` is the main memory that it needs per node, and
    `chunk_tokens` the number of trained tokens whose logits exist at a time.
    """

    combination: Combination
    batch: Batch
    peak: PeakMemory
    tokens_per_sec: float | None
    fits: bool
    is_allowed: bool
    host_gib: float
    chunk_tokens: int
    step: StepTime | None


@dataclass(frozen=True)
class Situation:
    """The inputs for trying combinations: settings, model, data, ranks, and the GPU's type and memory, None if unknown.

    `liger` is whether the ranks are sure to try Liger. `chunk_tokens` is a decided chunk of the loss, None to choose
    the largest that fits. `rates` replace those of the GPU.
    """

    config: RunConfig
    model: ModelFacts
    data: DataFacts | None
    topology: Topology
    gpu: GpuType | None
    device_gib: float | None
    liger: bool = False
    chunk_tokens: int | None = None
    rates: Rates | None = None


def choose(situation: Situation) -> Considered:
    """Return the combination for a run: the fastest that the settings allow and that fits, or else the smallest.

    On CPUs, or if nothing is known about the GPUs, the micro-batch follows the tokens of a forward pass; large models on GPUs
    recompute all layers.

    Raises:
        ConfigError: if the global batch does not divide over the ranks, or the rows of a rank over the micro-batch.
    """
    config, topology = situation.config, situation.topology
    split = split_batch(config.train, config.data, topology.world_size, topology.device, situation.data)
    layers = config.model.activation_checkpointing
    if layers == AUTO:
        layers = ALL if topology.device == "cuda" and situation.model.num_params >= memory.RECOMPUTED_FROM else NONE
    usual = build_combination(situation, split.micro_batch_size, layers)
    first = evaluate(situation, usual)
    if topology.device != "cuda" or situation.device_gib is None:
        return first
    tried = [first, *(evaluate(situation, one) for one in _list_allowed(situation, usual) if one != usual)]
    fitting = [one for one in tried if one.fits]
    if not fitting:
        return min(tried, key=lambda one: one.peak.peak_gib)
    if not first.peak.is_measured:
        limit_gib = PREFERRED_SHARE * situation.device_gib
        fitting = [one for one in fitting if one.peak.peak_gib <= limit_gib] or fitting
    if first.tokens_per_sec is None:
        # Less recomputation first, then more tokens per forward pass.
        def recomputed_share(one: Considered) -> float:
            every = interval(one.combination.checkpointing)
            return 1 / every if every else 0.0

        return min(fitting, key=lambda one: (recomputed_share(one), -one.combination.micro_batch_size))
    fastest = max(one.tokens_per_sec or 0.0 for one in fitting)
    as_fast = [one for one in fitting if (one.tokens_per_sec or 0.0) >= _AS_FAST * fastest]
    # Among equally fast ones, prefer the tokens that keep a GPU busy, because hooks and launches may take longer than assumed.
    target, row = _count_busy_tokens(situation.model.num_params), config.data.max_length
    return min(as_fast, key=lambda one: (max(0, target - one.batch.micro_batch_size * row), one.peak.peak_gib))


def build_combination(situation: Situation, micro_batch_size: int, checkpointing: str) -> Combination:
    """Return the combination with this micro-batch and these recomputed layers, and everything else as configured."""
    deepspeed = situation.config.deepspeed
    return Combination(
        micro_batch_size,
        checkpointing,
        situation.liger,
        situation.config.model.compile,
        memory.num_hpz_ranks(deepspeed, situation.topology.ranks_per_node),
        deepspeed.offload_optimizer,
        deepspeed.offload_params,
    )


def rank_combinations(situation: Situation) -> list[Considered]:
    """Return the chosen combination and its alternatives, including those that the settings exclude, fastest first."""
    chosen = choose(situation)
    base, ranks = chosen.combination, situation.topology.ranks_per_node
    tried = {base: chosen}
    for one in _list_allowed(situation, base):
        tried.setdefault(one, evaluate(situation, one))
    variants = []
    if base.liger or has_liger_kernels(situation.config.model, situation.model, situation.topology.device):
        variants.append(replace(base, liger=not base.liger))
    if situation.topology.device == "cuda":
        variants.append(replace(base, compiled=not base.compiled))
    if situation.topology.nodes > 1 or base.hpz_ranks > 1:
        variants.append(replace(base, hpz_ranks=1 if base.hpz_ranks > 1 else ranks))
    if OPTIMIZERS[situation.config.optim.name].can_offload:
        variants += [replace(base, offload_optimizer="cpu"), replace(base, offload_optimizer="cpu", offload_params="cpu")]
    if base.offload_optimizer != "none":
        variants.append(replace(base, offload_optimizer="none", offload_params="none"))
    for variant in variants:
        # Each with the micro-batch and the recomputed layers that suit it.
        options = [evaluate(situation, one, is_allowed=False) for one in (variant, *_list_allowed(situation, variant))]
        fitting = [one for one in options if one.fits] or [min(options, key=lambda one: one.peak.peak_gib)]
        best = max(fitting, key=lambda one: one.tokens_per_sec or 0.0)
        tried.setdefault(best.combination, best)
    return sorted(tried.values(), key=lambda one: (not one.fits, -(one.tokens_per_sec or 0.0), one.peak.peak_gib))


def evaluate(situation: Situation, combination: Combination, is_allowed: bool = True) -> Considered:
    """Return a combination together with its peak memory and speed."""
    config, model, topology = situation.config, situation.model, situation.topology
    states_of = ("offload_optimizer", "offload_params")
    changes = {"hpz_partition_size": combination.hpz_ranks, **{key: getattr(combination, key) for key in states_of}}
    deepspeed = config.deepspeed.model_copy(update=changes)
    train = config.train.model_copy(update={"micro_batch_size": combination.micro_batch_size})
    split = split_batch(train, config.data, topology.world_size, topology.device, situation.data)
    optimizer, dtype = OPTIMIZERS[config.optim.name], config.model.dtype
    rendered = deepspeed_json.render(deepspeed, config.model, train, split, topology, model, optimizer, "")
    states = memory.estimate_model_states(
        model.num_params, dtype, split.accumulation, optimizer, deepspeed, topology, situation.device_gib
    )
    kernels = Kernels(
        deepspeed_json.WIDTHS[dtype],
        attention_kernel(config, model, topology.device),
        config.data.max_length,
        config.data.packing,
        combination.liger,
        combination.compiled,
    )
    one_pass = Pass(
        split.micro_batch_size * config.data.max_length,
        kernels,
        checkpointed_layers(combination.checkpointing, model.num_layers),
        situation.chunk_tokens or LOSS_CHUNK_TOKENS,
    )
    sharding = Sharding(
        rendered["zero_optimization"],
        topology.world_size,
        round(states.per_rank_gib * memory.GIB),
        4 if split.accumulation > 1 else kernels.width,
        deepspeed_json.reduced_width(rendered, dtype),
        deepspeed_json.gathered_width(rendered, dtype),
        combination.hpz_ranks,
        combination.offload_optimizer,
        combination.offload_params,
        whole_layers=combination.compiled,
    )
    gpu = (situation.gpu or GpuType(0, 0, 0, 0, "")) if topology.device == "cuda" else None
    peak = estimate_peak(model, one_pass, sharding, gpu)
    if gpu is not None and situation.device_gib is not None and situation.chunk_tokens is None:
        # The largest chunk that fits: the sum of the head's gradient is read and written once per chunk, which on an H100 takes
        # a fourth of the head's time with chunks of 1024 tokens, and a sixteenth with chunks of 4096 tokens.
        sizes = [(size, estimate_peak(model, replace(one_pass, chunk_tokens=size), sharding, gpu)) for size in _CHUNK_TOKENS]
        limits = (share * situation.device_gib for share in (PREFERRED_SHARE, USABLE_SHARE))
        fitting = ((size, one) for limit in limits for size, one in sizes if one.peak_gib <= limit)
        chunk_tokens, peak = next(fitting, sizes[-1])
        one_pass = replace(one_pass, chunk_tokens=chunk_tokens)
    rates = situation.rates or (gpu_rates(situation.gpu, kernels) if situation.gpu is not None else None)
    step = None if rates is None else predict_step(model, situation.data, split, topology, sharding, one_pass, rates)
    return Considered(
        combination,
        split,
        peak,
        tokens_per_sec=None if step is None else split.max_tokens_per_step / step.total_s,
        fits=situation.device_gib is None or peak.peak_gib <= USABLE_SHARE * situation.device_gib,
        is_allowed=is_allowed,
        host_gib=states.host_per_node_gib,
        chunk_tokens=one_pass.chunk_tokens,
        step=step,
    )


def _list_allowed(situation: Situation, base: Combination) -> Iterator[Combination]:
    """Yield the combinations with other micro-batches and layers, if the settings leave these to the plan."""
    config, per_rank = situation.config, situation.config.train.global_batch_size // situation.topology.world_size
    sizes = [base.micro_batch_size]
    if config.train.micro_batch_size is None:
        most = max(1, max(_MOST_TOKENS, _count_busy_tokens(situation.model.num_params)) // config.data.max_length)
        sizes = [size for size in list_divisors(per_rank) if size <= most]
    layers = _CHECKPOINTING if config.model.activation_checkpointing == AUTO else (base.checkpointing,)
    yield from (replace(base, micro_batch_size=size, checkpointing=one) for size in sizes for one in layers)


def _count_busy_tokens(num_params: int) -> int:
    """Return the tokens per forward pass that keep a GPU busy between DeepSpeed's hooks: more for small models."""
    return min(_MOST_BUSY_TOKENS, max(_BUSY_TOKENS, round(_BUSY_FLOPS / (6 * max(1, num_params)))))


def find_nearest_fits(situation: Situation, usd_per_gpu_hour: float | None) -> list[str]:
    """Return overrides that make the run fit, each with its peak, predicted speed and cost.

    First those that leave to the plan what the settings decide, then more nodes, offload, shorter rows, and larger GPUs.
    """
    fits = []
    for changes in _list_changes(situation):
        for words, changed in changes:
            with suppress(ConfigError):
                if not (chosen := choose(changed)).fits:
                    continue
                parts = [f"{chosen.peak.peak_gib:.0f} of {changed.device_gib:.0f} GiB"]
                price = changed.gpu.usd_per_hour if words.startswith("cluster.gpu_type") and changed.gpu else usd_per_gpu_hour
                if chosen.tokens_per_sec is not None:
                    parts.append(f"about {chosen.tokens_per_sec:,.0f} tokens/s")
                    if price is not None:
                        usd = changed.topology.world_size * price / 3600 / chosen.tokens_per_sec * 1e6
                        parts.append(f"${usd:,.2f} per million tokens")
                if chosen.host_gib:
                    parts.append(f"{chosen.host_gib:.0f} GiB of main memory per node")
                fits.append(f"{words} ({', '.join(parts)})")
                break
    return fits


def _list_changes(situation: Situation) -> Iterator[list[tuple[str, Situation]]]:
    """Yield the changes of each kind that may make a run fit, the smallest one first, with the situation after it."""
    config, topology = situation.config, situation.topology

    def change(base: RunConfig, section: str, **values: object) -> RunConfig:
        return base.model_copy(update={section: getattr(base, section).model_copy(update=values)})

    def list_situations(configs: dict[str, RunConfig]) -> list[tuple[str, Situation]]:
        return [(words, replace(situation, config=changed)) for words, changed in configs.items()]

    sets_size = config.train.micro_batch_size is not None
    sets_layers = config.model.activation_checkpointing != AUTO
    free: dict[str, RunConfig] = {}
    if sets_size:
        free[_MICRO_BATCH] = change(config, "train", micro_batch_size=None)
    if sets_layers:
        free[_LAYERS] = change(config, "model", activation_checkpointing=AUTO)
    if sets_size and sets_layers:
        free[" ".join(CHOSEN_BY_PLAN)] = change(free[_MICRO_BATCH], "model", activation_checkpointing=AUTO)
    yield list_situations(free)

    more_nodes = []
    for nodes in (factor * topology.nodes for factor in _NODE_FACTORS):
        ranks = topology.ranks_per_node
        larger = topology.model_copy(update={"nodes": nodes, "world_size": nodes * ranks})
        more_nodes.append((f"{nodes} nodes of {ranks} GPUs", replace(situation, topology=larger)))
    yield more_nodes

    offloads = (config.deepspeed.offload_optimizer, config.deepspeed.offload_params)
    if OPTIMIZERS[config.optim.name].can_offload and "nvme" not in offloads:
        offloaded: dict[str, RunConfig] = {}
        if offloads[0] == "none":
            offloaded["deepspeed.offload_optimizer=cpu"] = change(config, "deepspeed", offload_optimizer="cpu")
        both = {"offload_optimizer": "cpu", "offload_params": "cpu"}
        offloaded[" ".join(f"deepspeed.{key}=cpu" for key in both)] = change(config, "deepspeed", **both)
        yield list_situations(offloaded)

    shorter: dict[str, RunConfig] = {}
    length = config.data.max_length // 2
    while length >= _SHORTEST_ROW:
        shorter[f"data.max_length={length}"] = change(config, "data", max_length=length)
        length //= 2
    yield list_situations(shorter)

    gpus = sorted((gpu.memory_gib, name) for name, gpu in GPUS.items() if gpu.memory_gib > (situation.device_gib or 0))
    yield [(f"cluster.gpu_type={name}", replace(situation, gpu=GPUS[name], device_gib=gib)) for gib, name in gpus]


def memory_savings(situation: Situation, micro_batch_size: int, checkpointing: str) -> list[str]:
    """Return settings that lower the peak of a run, each with the GiB per GPU that it saves by the plan, largest first.

    `situation` has the chosen chunk of the loss, so that it does not use up what a change saves.
    """
    config, base = situation.config, build_combination(situation, micro_batch_size, checkpointing)
    smaller = max((size for size in range(1, micro_batch_size) if micro_batch_size % size == 0), default=None)
    changes: dict[str, dict[str, Any]] = {}
    if smaller is not None:
        changes[f"train.micro_batch_size={smaller}"] = {"micro_batch_size": smaller}
    if checkpointing != ALL:
        changes["model.activation_checkpointing=all"] = {"checkpointing": ALL}
    if not base.liger and has_liger_kernels(config.model, situation.model, situation.topology.device):
        changes["model.liger=true"] = {"liger": True}
    if base.offload_optimizer == "none" and OPTIMIZERS[config.optim.name].can_offload:
        changes["deepspeed.offload_optimizer=cpu"] = {"offload_optimizer": "cpu"}
    peak_gib = evaluate(situation, base).peak.tensors_gib
    saved = {words: peak_gib - evaluate(situation, replace(base, **one)).peak.tensors_gib for words, one in changes.items()}
    return [f"{words} (saves {gib:.1f} GiB)" for words, gib in sorted(saved.items(), key=lambda one: -one[1]) if gib >= 0.05]
