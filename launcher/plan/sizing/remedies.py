"""Finds changes that make a run fit that is too large for its GPUs, with their predicted speed and cost. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from launcher.config.schema import RunConfig
from launcher.errors import ConfigError
from launcher.plan.gpu_types import GPUS
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.sizing.checkpointed_layers import ALL, AUTO
from launcher.plan.sizing.combinations import Considered, Situation, as_set, choose, evaluate
from launcher.plan.sizing.kernels import has_liger_kernels, may_lack_liger

# Values with which the plan chooses the micro-batch and the recomputed layers.
CHOSEN_BY_PLAN = _MICRO_BATCH, _LAYERS = ("train.micro_batch_size=null", "model.activation_checkpointing=auto")
_MOST_NODES = 64
_SHORTEST_ROW = 1024
_OFFLOADS = ({"offload_optimizer": "cpu"}, {"offload_optimizer": "cpu", "offload_params": "cpu"})


def nearest_fits(situation: Situation, usd_per_gpu_hour: float | None) -> list[str]:
    """Return overrides that make the run fit, each with its peak, predicted speed and cost.

    First those that leave to the plan what the settings decide, then memory planned for Liger, more nodes, offload, shorter
    rows, and larger GPUs.
    """
    others = (_more_nodes(situation), _offload(situation), _shorter_rows(situation), _larger_gpu(situation))
    tried = (_left_to_the_plan(situation), _certain_liger(situation), *others)
    return [_described(words, at, one, usd_per_gpu_hour) for words, at, one in filter(None, map(_first_fit, tried))]


def memory_savings(situation: Situation, micro_batch_size: int, checkpointing: str) -> list[str]:
    """Return settings that lower the peak of a run, each with the GiB per GPU that it saves by the plan, largest first."""
    config, base = situation.config, as_set(situation, micro_batch_size, checkpointing)
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
    chosen = evaluate(situation, base, is_allowed=True)
    # Keep the chosen chunk, so that it does not use up what a change saves.
    train = config.train.model_copy(update={"loss_chunk_tokens": chosen.chunk_tokens})
    situation, peak_gib = replace(situation, config=_with(config, "train", train)), chosen.peak.tensors_gib
    saved = {
        words: peak_gib - evaluate(situation, replace(base, **change), is_allowed=True).peak.tensors_gib
        for words, change in changes.items()
    }
    return [f"{words} (saves {gib:.1f} GiB)" for words, gib in sorted(saved.items(), key=lambda one: -one[1]) if gib >= 0.05]


def _first_fit(tried: Iterator[tuple[str, Situation]]) -> tuple[str, Situation, Considered] | None:
    for words, situation in tried:
        with suppress(ConfigError):
            chosen = choose(situation)
            if chosen.fits:
                return words, situation, chosen
    return None


def _left_to_the_plan(situation: Situation) -> Iterator[tuple[str, Situation]]:
    """Yield the situation with one, then with both, of the settings of a pass that the plan would choose."""
    config = situation.config
    without: dict[str, dict[str, Any]] = {}
    if config.train.micro_batch_size is not None:
        without[_MICRO_BATCH] = {"train": {"micro_batch_size": None}}
    if config.model.activation_checkpointing != AUTO:
        without[_LAYERS] = {"model": {"activation_checkpointing": AUTO}}
    for words in (*([one] for one in without), *([[*without]] if len(without) > 1 else [])):
        changed = config
        for section, values in (item for word in words for item in without[word].items()):
            changed = _with(changed, section, getattr(changed, section).model_copy(update=values))
        yield " ".join(words), replace(situation, config=changed)


def _certain_liger(situation: Situation) -> Iterator[tuple[str, Situation]]:
    """Yield the situation with memory planned for Liger, if the ranks may lack it: then a run without Liger is refused."""
    if situation.liger and may_lack_liger(situation.config):
        section = situation.config.model.model_copy(update={"liger": True})
        yield "model.liger=true", replace(situation, config=_with(situation.config, "model", section))


def _more_nodes(situation: Situation) -> Iterator[tuple[str, Situation]]:
    topology = situation.topology
    nodes = topology.nodes * 2
    while nodes <= _MOST_NODES:
        sizes = {"nodes": nodes, "world_size": nodes * topology.ranks_per_node}
        yield f"{nodes} nodes of {topology.ranks_per_node} GPUs", replace(situation, topology=topology.model_copy(update=sizes))
        nodes *= 2


def _offload(situation: Situation) -> Iterator[tuple[str, Situation]]:
    section = situation.config.deepspeed
    if not OPTIMIZERS[situation.config.optim.name].can_offload:
        return
    for changed in _OFFLOADS:
        offloaded = section.model_copy(update=changed)
        if offloaded != section and "nvme" not in (section.offload_optimizer, section.offload_params):
            words = " ".join(f"deepspeed.{key}={value}" for key, value in changed.items())
            yield words, replace(situation, config=_with(situation.config, "deepspeed", offloaded))


def _shorter_rows(situation: Situation) -> Iterator[tuple[str, Situation]]:
    length = situation.config.data.max_length // 2
    while length >= _SHORTEST_ROW:
        data = situation.config.data.model_copy(update={"max_length": length})
        yield f"data.max_length={length}", replace(situation, config=_with(situation.config, "data", data))
        length //= 2


def _larger_gpu(situation: Situation) -> Iterator[tuple[str, Situation]]:
    larger = [(gpu.memory_gib, name) for name, gpu in GPUS.items() if gpu.memory_gib > (situation.device_gib or 0)]
    for memory_gib, name in sorted(larger):
        yield f"cluster.gpu_type={name}", replace(situation, gpu=GPUS[name], device_gib=memory_gib)


def _with(config: RunConfig, section: str, value: object) -> RunConfig:
    return config.model_copy(update={section: value})


def _described(words: str, situation: Situation, chosen: Considered, usd_per_gpu_hour: float | None) -> str:
    price = situation.gpu.usd_per_hour if words.startswith("cluster.gpu_type") and situation.gpu else usd_per_gpu_hour
    parts = [f"{chosen.peak.peak_gib:.0f} of {situation.device_gib:.0f} GiB"]
    if chosen.tokens_per_sec is not None:
        parts.append(f"about {chosen.tokens_per_sec:,.0f} tokens/s")
        if price is not None:
            usd = situation.topology.world_size * price / 3600 / chosen.tokens_per_sec * 1e6
            parts.append(f"${usd:,.2f} per million tokens")
    if chosen.host_gib:
        parts.append(f"{chosen.host_gib:.0f} GiB of main memory per node")
    return f"{words} ({', '.join(parts)})"
