"""Finds changes that make a run fit that is too large for its GPUs, with their predicted speed and cost. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from launcher.errors import ConfigError
from launcher.plan.gpu_types import GPUS
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.sizing.checkpointed_layers import ALL, AUTO
from launcher.plan.sizing.combinations import Considered, Situation, as_set, choose, evaluate
from launcher.plan.sizing.kernels import has_liger_kernels

# Values with which the plan chooses the micro-batch and the recomputed layers.
CHOSEN_BY_PLAN = _MICRO_BATCH, _LAYERS = ("train.micro_batch_size=null", "model.activation_checkpointing=auto")
_NODE_FACTORS, _SHORTEST_ROW = (2, 4, 8, 16, 32), 1024


def nearest_fits(situation: Situation, usd_per_gpu_hour: float | None) -> list[str]:
    """Return overrides that make the run fit, each with its peak, predicted speed and cost.

    First those that leave to the plan what the settings decide, then more nodes, offload, shorter rows, and larger GPUs.
    """
    fits = []
    for changes in (_left_to_the_plan, _more_nodes, _offload, _shorter_rows, _larger_gpu):
        for words, changed in changes(situation):
            with suppress(ConfigError):
                if (chosen := choose(changed)).fits:
                    fits.append(_described(words, changed, chosen, usd_per_gpu_hour))
                    break
    return fits


def memory_savings(situation: Situation, micro_batch_size: int, checkpointing: str) -> list[str]:
    """Return settings that lower the peak of a run, each with the GiB per GPU that it saves by the plan, largest first.

    `situation` has the chosen chunk of the loss, so that it does not use up what a change saves.
    """
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
    peak_gib = evaluate(situation, base).peak.tensors_gib
    saved = {words: peak_gib - evaluate(situation, replace(base, **one)).peak.tensors_gib for words, one in changes.items()}
    return [f"{words} (saves {gib:.1f} GiB)" for words, gib in sorted(saved.items(), key=lambda one: -one[1]) if gib >= 0.05]


def _changed(situation: Situation, section: str, **values: object) -> Situation:
    config = situation.config
    return replace(situation, config=config.model_copy(update={section: getattr(config, section).model_copy(update=values)}))


def _left_to_the_plan(situation: Situation) -> Iterator[tuple[str, Situation]]:
    """Yield the situation with one, then with both, of the settings of a pass that the plan would choose."""
    sets_size = situation.config.train.micro_batch_size is not None
    sets_layers = situation.config.model.activation_checkpointing != AUTO
    any_size = _changed(situation, "train", micro_batch_size=None)
    if sets_size:
        yield _MICRO_BATCH, any_size
    if sets_layers:
        yield _LAYERS, _changed(situation, "model", activation_checkpointing=AUTO)
    if sets_size and sets_layers:
        yield " ".join(CHOSEN_BY_PLAN), _changed(any_size, "model", activation_checkpointing=AUTO)


def _more_nodes(situation: Situation) -> Iterator[tuple[str, Situation]]:
    for factor in _NODE_FACTORS:
        nodes, ranks = factor * situation.topology.nodes, situation.topology.ranks_per_node
        topology = situation.topology.model_copy(update={"nodes": nodes, "world_size": nodes * ranks})
        yield f"{nodes} nodes of {ranks} GPUs", replace(situation, topology=topology)


def _offload(situation: Situation) -> Iterator[tuple[str, Situation]]:
    section = situation.config.deepspeed
    offloads = (section.offload_optimizer, section.offload_params)
    if OPTIMIZERS[situation.config.optim.name].can_offload and "nvme" not in offloads:
        if offloads[0] == "none":
            yield "deepspeed.offload_optimizer=cpu", _changed(situation, "deepspeed", offload_optimizer="cpu")
        both = {"offload_optimizer": "cpu", "offload_params": "cpu"}
        yield " ".join(f"deepspeed.{key}=cpu" for key in both), _changed(situation, "deepspeed", **both)


def _shorter_rows(situation: Situation) -> Iterator[tuple[str, Situation]]:
    length = situation.config.data.max_length // 2
    while length >= _SHORTEST_ROW:
        yield f"data.max_length={length}", _changed(situation, "data", max_length=length)
        length //= 2


def _larger_gpu(situation: Situation) -> Iterator[tuple[str, Situation]]:
    larger = [(gpu.memory_gib, name) for name, gpu in GPUS.items() if gpu.memory_gib > (situation.device_gib or 0)]
    for memory_gib, name in sorted(larger):
        yield f"cluster.gpu_type={name}", replace(situation, gpu=GPUS[name], device_gib=memory_gib)


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
