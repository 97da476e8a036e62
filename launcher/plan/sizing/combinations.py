"""Combinations of micro-batch, checkpointing, kernels, hpZ and offload that a run could use, with their peak memory and speed.

The plan takes the fastest combination that the settings allow and that fits. The others show what an override would gain, and
which changes make a run fit that is too large for its GPUs. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from launcher.config.schema import RunConfig
from launcher.errors import ConfigError
from launcher.plan import deepspeed as deepspeed_json
from launcher.plan.gpu_types import GPUS, GpuType
from launcher.plan.launch_plan import LOSS_CHUNK_TOKENS, Batch, DataFacts, Memory, ModelFacts, PeakMemory, Topology
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.sizing import memory
from launcher.plan.sizing.layers import (
    ALL,
    AUTO,
    NONE,
    Kernels,
    attention_kernel,
    checkpointed_layers,
    checkpointing_interval,
    has_liger_kernels,
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
CHOSEN_BY_PLAN = ("train.micro_batch_size=null", "model.activation_checkpointing=auto")
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
class CombinationEstimate:
    """A combination with the parts of the plan that follow from it, its predicted step and its tokens per second over all ranks.

    `step` and `tokens_per_sec` are None if unknown. `is_allowed` is whether the settings leave the combination to the plan.
    `chunk_tokens` is the number of trained tokens whose logits exist at a time.
    """

    combination: Combination
    batch: Batch
    deepspeed: dict[str, Any]
    memory: Memory
    peak: PeakMemory
    chunk_tokens: int
    fits: bool
    is_allowed: bool
    step: StepTime | None
    tokens_per_sec: float | None


@dataclass(frozen=True)
class SizingInputs:
    """What the estimates depend on: settings, model, data, ranks, and the GPU's type and memory, None if unknown.

    `liger` is whether the ranks are sure to try Liger. `nvme_folder` is the run's folder on each node's NVMe disk. `chunk_tokens`
    is a decided chunk of the loss, None to choose the largest that fits. `rates` replace those of the GPU.
    """

    config: RunConfig
    model: ModelFacts
    data: DataFacts | None
    topology: Topology
    gpu: GpuType | None
    device_gib: float | None
    liger: bool = False
    nvme_folder: str | None = None
    chunk_tokens: int | None = None
    rates: Rates | None = None


def choose_combination(inputs: SizingInputs) -> CombinationEstimate:
    """Return the combination for a run: the fastest that the settings allow and that fits, or else the smallest.

    On CPUs, or if nothing is known about the GPUs, the micro-batch follows the tokens of a forward pass; large models on GPUs
    recompute all layers.

    Raises:
        ConfigError: if the global batch does not divide over the ranks, or the rows of a rank over the micro-batch.
    """
    config, topology, num_params = inputs.config, inputs.topology, inputs.model.num_params
    split = split_batch(config.train, config.data, topology.data_ranks, topology.device, inputs.data)
    layers = config.model.activation_checkpointing
    if layers == AUTO:
        layers = ALL if topology.device == "cuda" and num_params >= memory.RECOMPUTED_FROM else NONE
    usual = build_combination(inputs, split.micro_batch_size, layers)
    first = estimate_combination(inputs, usual)
    if topology.device != "cuda" or inputs.device_gib is None:
        return first
    others = (estimate_combination(inputs, other) for other in _list_allowed(inputs, usual) if other != usual)
    estimates = [first, *others]
    fitting = [estimate for estimate in estimates if estimate.fits]
    if not fitting:
        return min(estimates, key=lambda estimate: estimate.peak.peak_gib)
    if not first.peak.is_measured:
        limit_gib = PREFERRED_SHARE * inputs.device_gib
        fitting = [estimate for estimate in fitting if estimate.peak.peak_gib <= limit_gib] or fitting
    if first.tokens_per_sec is None:
        # Less recomputation first, then more tokens per forward pass.
        def recomputed_share(estimate: CombinationEstimate) -> float:
            every = checkpointing_interval(estimate.combination.checkpointing)
            return 1 / every if every else 0.0

        return min(fitting, key=lambda estimate: (recomputed_share(estimate), -estimate.combination.micro_batch_size))
    fastest = max(estimate.tokens_per_sec or 0.0 for estimate in fitting)
    as_fast = [estimate for estimate in fitting if (estimate.tokens_per_sec or 0.0) >= _AS_FAST * fastest]
    # Among equally fast ones, prefer the tokens that keep a GPU busy, because hooks and launches may take longer than assumed.
    target, row = _count_busy_tokens(num_params), config.data.max_length
    return min(as_fast, key=lambda one: (max(0, target - one.batch.micro_batch_size * row), one.peak.peak_gib))


def build_combination(inputs: SizingInputs, micro_batch_size: int, checkpointing: str) -> Combination:
    """Return the combination with this micro-batch and these recomputed layers, and everything else as configured."""
    deepspeed = inputs.config.deepspeed
    return Combination(
        micro_batch_size,
        checkpointing,
        inputs.liger,
        inputs.config.model.compile,
        memory.num_hpz_ranks(deepspeed, inputs.topology.ranks_per_node),
        deepspeed.offload_optimizer,
        deepspeed.offload_params,
    )


def rank_combinations(inputs: SizingInputs) -> list[CombinationEstimate]:
    """Return the chosen combination and its alternatives, including those that the settings exclude, fastest first."""
    chosen = choose_combination(inputs)
    base, device = chosen.combination, inputs.topology.device
    estimates = {base: chosen}
    for combination in _list_allowed(inputs, base):
        estimates.setdefault(combination, estimate_combination(inputs, combination))
    variants = []
    if base.liger or has_liger_kernels(inputs.config.model, inputs.model, device):
        variants.append(replace(base, liger=not base.liger))
    if device == "cuda":
        variants.append(replace(base, compiled=not base.compiled))
    if inputs.topology.nodes > 1 or base.hpz_ranks > 1:
        variants.append(replace(base, hpz_ranks=1 if base.hpz_ranks > 1 else inputs.topology.ranks_per_node))
    if OPTIMIZERS[inputs.config.optim.name].can_offload:
        variants += [replace(base, offload_optimizer="cpu"), replace(base, offload_optimizer="cpu", offload_params="cpu")]
    if base.offload_optimizer != "none":
        variants.append(replace(base, offload_optimizer="none", offload_params="none"))
    for variant in variants:
        # Each with the micro-batch and the recomputed layers that suit it.
        options = [
            estimate_combination(inputs, combination, is_allowed=False)
            for combination in (variant, *_list_allowed(inputs, variant))
        ]
        fitting = [option for option in options if option.fits] or [min(options, key=lambda option: option.peak.peak_gib)]
        best = max(fitting, key=lambda option: option.tokens_per_sec or 0.0)
        estimates.setdefault(best.combination, best)
    return sorted(estimates.values(), key=lambda one: (not one.fits, -(one.tokens_per_sec or 0.0), one.peak.peak_gib))


def estimate_combination(inputs: SizingInputs, combination: Combination, is_allowed: bool = True) -> CombinationEstimate:
    """Estimate the peak memory and the speed of a combination."""
    config, model, topology, device_gib = inputs.config, inputs.model, inputs.topology, inputs.device_gib
    offloads = {"offload_optimizer": combination.offload_optimizer, "offload_params": combination.offload_params}
    deepspeed = config.deepspeed.model_copy(update={"hpz_partition_size": combination.hpz_ranks, **offloads})
    train = config.train.model_copy(update={"micro_batch_size": combination.micro_batch_size})
    split = split_batch(train, config.data, topology.data_ranks, topology.device, inputs.data)
    optimizer, dtype = OPTIMIZERS[config.optim.name], config.model.dtype
    rendered = deepspeed_json.render(deepspeed, config.model, train, split, topology, model, optimizer, inputs.nvme_folder)
    states = memory.estimate_model_states(model.num_params, dtype, split.accumulation, optimizer, deepspeed, topology, device_gib)
    kernels = Kernels(
        deepspeed_json.WIDTHS[dtype],
        attention_kernel(config, model, topology.device),
        config.data.max_length,
        config.data.packing,
        combination.liger,
        combination.compiled,
    )
    sharding = Sharding(
        rendered["zero_optimization"],
        topology.world_size,
        round(states.per_rank_gib * memory.GIB),
        4 if split.accumulation > 1 else kernels.width,
        deepspeed_json.reduced_width(rendered, dtype),
        deepspeed_json.gathered_width(rendered, dtype),
        combination.hpz_ranks,
        **offloads,
        whole_layers=combination.compiled,
    )
    gpu = (inputs.gpu or GpuType(0, 0, 0, 0, "")) if topology.device == "cuda" else None
    tokens, layers = (
        split.micro_batch_size * config.data.max_length,
        checkpointed_layers(combination.checkpointing, model.num_layers),
    )
    chunk_sizes: tuple[int, ...] = (inputs.chunk_tokens or LOSS_CHUNK_TOKENS,)
    if gpu is not None and device_gib is not None and inputs.chunk_tokens is None:
        chunk_sizes = _CHUNK_TOKENS
    passes = [Pass(tokens, kernels, layers, chunk_tokens) for chunk_tokens in chunk_sizes]
    peaks = [estimate_peak(model, one_pass, sharding, gpu) for one_pass in passes]
    # The largest chunk that fits: the sum of the head's gradient is read and written once per chunk, which on an H100 takes a
    # fourth of the head's time with chunks of 1024 tokens, and a sixteenth with chunks of 4096 tokens.
    limits_gib = (share * (device_gib or 0.0) for share in (PREFERRED_SHARE, USABLE_SHARE))
    chosen = next((i for limit_gib in limits_gib for i, peak in enumerate(peaks) if peak.peak_gib <= limit_gib), -1)
    rates = inputs.rates or (gpu_rates(inputs.gpu, kernels) if inputs.gpu is not None else None)
    step = None if rates is None else predict_step(model, inputs.data, split, topology, sharding, passes[chosen], rates)
    return CombinationEstimate(
        combination,
        split,
        rendered,
        states,
        peaks[chosen],
        chunk_sizes[chosen],
        fits=device_gib is None or peaks[chosen].peak_gib <= USABLE_SHARE * device_gib,
        is_allowed=is_allowed,
        step=step,
        tokens_per_sec=None if step is None else split.max_tokens_per_step / step.total_s,
    )


def _list_allowed(inputs: SizingInputs, base: Combination) -> Iterator[Combination]:
    """Yield the combinations with other micro-batches and layers, if the settings leave these to the plan."""
    config, per_rank = inputs.config, inputs.config.train.global_batch_size // inputs.topology.data_ranks
    sizes = [base.micro_batch_size]
    if config.train.micro_batch_size is None:
        most = max(1, max(_MOST_TOKENS, _count_busy_tokens(inputs.model.num_params)) // config.data.max_length)
        sizes = [size for size in list_divisors(per_rank) if size <= most]
    layers = _CHECKPOINTING if config.model.activation_checkpointing == AUTO else (base.checkpointing,)
    yield from (replace(base, micro_batch_size=size, checkpointing=one) for size in sizes for one in layers)


def _count_busy_tokens(num_params: int) -> int:
    """Return the tokens per forward pass that keep a GPU busy between DeepSpeed's hooks: more for small models."""
    return min(_MOST_BUSY_TOKENS, max(_BUSY_TOKENS, round(_BUSY_FLOPS / (6 * max(1, num_params)))))


def find_nearest_fits(inputs: SizingInputs, usd_per_gpu_hour: float | None) -> list[str]:
    """Return overrides that make the run fit, each with its peak, predicted speed and cost.

    First those that leave to the plan what the settings decide, then more nodes, offload, shorter rows, and larger GPUs.
    """
    fits = []
    for changes in _list_changes(inputs):
        for words, changed in changes:
            with suppress(ConfigError):
                if not (chosen := choose_combination(changed)).fits:
                    continue
                parts = [f"{chosen.peak.peak_gib:.0f} of {changed.device_gib:.0f} GiB"]
                price = changed.gpu.usd_per_hour if words.startswith("cluster.gpu_type") and changed.gpu else usd_per_gpu_hour
                if chosen.tokens_per_sec is not None:
                    parts.append(f"about {chosen.tokens_per_sec:,.0f} tokens/s")
                    if price is not None:
                        usd = changed.topology.world_size * price / 3600 / chosen.tokens_per_sec * 1e6
                        parts.append(f"${usd:,.2f} per million tokens")
                if host_gib := chosen.memory.host_per_node_gib:
                    parts.append(f"{host_gib:.0f} GiB of main memory per node")
                fits.append(f"{words} ({', '.join(parts)})")
                break
    return fits


def _list_changes(inputs: SizingInputs) -> Iterator[Iterable[tuple[str, SizingInputs]]]:
    """Yield the changes of each kind that may make a run fit, the smallest one first, with the inputs after it."""
    config, topology, ranks = inputs.config, inputs.topology, inputs.topology.ranks_per_node

    def override(words: str) -> tuple[str, SizingInputs]:
        changes: dict[str, dict[str, Any]] = {}
        for word in words.split():
            key, _, value = word.partition("=")
            section, _, name = key.partition(".")
            changes.setdefault(section, {})[name] = None if value == "null" else int(value) if value.isdecimal() else value
        sections = {section: getattr(config, section).model_copy(update=update) for section, update in changes.items()}
        return words, replace(inputs, config=config.model_copy(update=sections))

    is_set = (config.train.micro_batch_size is not None, config.model.activation_checkpointing != AUTO)
    freed = [words for words, is_one_set in zip(CHOSEN_BY_PLAN, is_set, strict=True) if is_one_set]
    yield map(override, freed if len(freed) < len(CHOSEN_BY_PLAN) else [*freed, " ".join(freed)])

    more_nodes = []
    for nodes in (factor * topology.nodes for factor in _NODE_FACTORS):
        larger = topology.model_copy(update={"nodes": nodes, "world_size": nodes * ranks})
        more_nodes.append((f"{nodes} nodes of {ranks} GPUs", replace(inputs, topology=larger)))
    yield more_nodes

    offloads = (config.deepspeed.offload_optimizer, config.deepspeed.offload_params)
    if OPTIMIZERS[config.optim.name].can_offload and "nvme" not in offloads:
        optimizer = "deepspeed.offload_optimizer=cpu"
        both = f"{optimizer} deepspeed.offload_params=cpu"
        yield map(override, (optimizer, both) if offloads[0] == "none" else (both,))

    lengths = [length for i in range(1, 32) if (length := config.data.max_length >> i) >= _SHORTEST_ROW]
    yield map(override, [f"data.max_length={length}" for length in lengths])

    gpus = sorted((gpu.memory_gib, name) for name, gpu in GPUS.items() if gpu.memory_gib > (inputs.device_gib or 0))
    yield [(f"cluster.gpu_type={name}", replace(inputs, gpu=GPUS[name], device_gib=gib)) for gib, name in gpus]


def memory_savings(inputs: SizingInputs, micro_batch_size: int, checkpointing: str) -> list[str]:
    """Return the settings that lower the peak of a run with this micro-batch and these recomputed layers."""
    config, base = inputs.config, build_combination(inputs, micro_batch_size, checkpointing)
    smaller = max((size for size in range(1, micro_batch_size) if micro_batch_size % size == 0), default=None)
    can_offload = base.offload_optimizer == "none" and OPTIMIZERS[config.optim.name].can_offload
    has_liger = not base.liger and has_liger_kernels(config.model, inputs.model, inputs.topology.device)
    return [
        *([f"train.micro_batch_size={smaller}"] if smaller is not None else []),
        *(["model.activation_checkpointing=all"] if checkpointing != ALL else []),
        *(["model.liger=true"] if has_liger else []),
        *(["deepspeed.offload_optimizer=cpu"] if can_offload else []),
    ]
