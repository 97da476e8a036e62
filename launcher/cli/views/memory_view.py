"""Lines for the user about a plan's peak memory, and about the combinations of settings that the plan considered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from launcher.cli.formatting import table, wrap
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import situation_of
from launcher.plan.quantities import format_count
from launcher.plan.sizing.combinations import PREFERRED_SHARE, USABLE_SHARE, Considered, as_set, choose, considered, evaluate
from launcher.plan.sizing.kernels import describe_liger
from launcher.plan.sizing.step_time import NETWORK

_MOST_ROWS = 16
# From this gain, a setting that the plan does not choose by itself is worth a note.
_CLEARLY_FASTER = 0.1
_STAGE_LEGEND = (
    "Rows are stages of a step, with the memory of one rank; the peak is the largest sum. states: a rank's part of weights, "
    "gradients and optimizer. buckets: what DeepSpeed communicates at once. activations: kept for the backward pass. gathered: "
    "weights of the layers that compute. gradients: those of a layer before they are divided. temporary: needed within a layer "
    "or a part of the loss."
)
_COMBINATION_LEGEND = (
    "micro-batch: rows that a rank computes at once. recomputed: layers that the backward pass computes again, to save memory. "
    "layers: gathered by module, as a whole (deepspeed.whole_layers), or compiled as well (model.compile, whose speed is not "
    "verified). Liger: fused kernels. hpZ: ranks of a node that hold the weights a second time. offload: what main memory holds. "
    "$/M tokens: dollars per million tokens."
)


def peak_line(plan: LaunchPlan) -> str | None:
    """Return a rank's peak memory by part, or None for a plan from an earlier launcher."""
    peak = plan.peak
    if peak is None:
        return None
    stage, device_gib = peak.largest, plan.memory.device_gib
    of = f" of {device_gib:.0f}" if device_gib is not None and plan.topology.device == "cuda" else ""
    parts = {
        "states": peak.states_gib,
        "buckets": peak.buckets_gib,
        "activations": stage.activations_gib,
        "gathered weights": stage.gathered_gib,
        "gradients": stage.gradients_gib,
        "temporary": stage.temporary_gib,
        "fragmentation": peak.fragmentation_gib,
        "CUDA and NCCL": peak.runtime_gib,
    }
    sizes = ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items() if gib >= 0.005)
    basis = "" if peak.is_measured or plan.topology.device == "cpu" else ", estimated"
    total = f"{peak.peak_gib:.2f}{of} GiB per rank{basis}, highest in the {stage.name} stage"
    kernels = describe_liger(plan.config, plan.model, plan.topology.device, plan.uses_liger)
    fp8 = "linear layers in FP8" if plan.config.model.fp8 else ""
    settings = ", ".join(filter(None, (_recomputed(plan), _layers(plan), kernels, fp8)))
    return f"{total}: {sizes or 'under 5 MiB each'}; {settings}"


def tight_note(plan: LaunchPlan) -> str:
    """Return a note if the estimated peak leaves a GPU no margin; empty if there is a margin or the memory is unknown."""
    peak, device_gib, ranks = plan.peak, plan.memory.device_gib, plan.topology.world_size
    if peak is None or plan.topology.device != "cuda" or device_gib is None:
        return ""
    if peak.peak_gib <= USABLE_SHARE * device_gib:
        return ""
    return (
        f"on {format_count(ranks, 'rank')} the estimated peak of {peak.peak_gib:.0f} GiB leaves less than {1 - USABLE_SHARE:.0%} "
        f"of a GPU's {device_gib:.0f} GiB: use more ranks, deepspeed=zero3_offload, or a smaller data.max_length"
    )


def hpz_note(plan: LaunchPlan) -> str:
    """Return a note if a second copy of the weights in each node fits and is predicted to be clearly faster; else empty.

    The plan does not choose it, because the prediction depends on the network, whose speed it assumes.
    """
    topology, device_gib = plan.topology, plan.memory.device_gib
    ranks = topology.ranks_per_node
    if topology.device != "cuda" or device_gib is None or topology.nodes == 1 or topology.world_size % ranks or ranks == 1:
        return ""
    situation = situation_of(plan)
    chosen = as_set(situation, plan.batch.micro_batch_size, plan.activation_checkpointing)
    if chosen.hpz_ranks > 1:
        return ""
    now, with_hpz = (evaluate(situation, one, is_allowed=False) for one in (chosen, replace(chosen, hpz_ranks=ranks)))
    if now.tokens_per_sec is None or with_hpz.tokens_per_sec is None or with_hpz.peak.peak_gib > PREFERRED_SHARE * device_gib:
        return ""
    gain = with_hpz.tokens_per_sec / now.tokens_per_sec - 1
    if gain < _CLEARLY_FASTER:
        return ""
    return (
        f"deepspeed.hpz_partition_size=node, a second copy of the weights in each node, is predicted to be {gain:.0%} faster "
        f"with {NETWORK * 8 / 1e9:.0f} Gbit/s between nodes, and needs {with_hpz.peak.peak_gib:.0f} of {device_gib:.0f} GiB per "
        "GPU: compare a few steps of both"
    )


def why_lines(plan: LaunchPlan) -> list[str]:
    """Return tables of the plan's memory in each stage of a step, and of the considered combinations."""
    return [
        *("", *_stages(plan), *wrap([_STAGE_LEGEND], 0)),
        *("", *_combinations(plan), *wrap([_COMBINATION_LEGEND, *_fp8(plan)], 0)),
    ]


def why_values(plan: LaunchPlan) -> list[dict[str, Any]]:
    """Return the considered combinations as JSON values."""
    return [
        {
            **asdict(one.combination),
            "peak_gib": one.peak.peak_gib,
            "tokens_per_sec": one.tokens_per_sec,
            "usd_per_million_tokens": _usd(plan, one),
            "fits": one.fits,
            "is_allowed": one.is_allowed,
            "is_chosen": _is_chosen(plan, one),
        }
        for one in considered(situation_of(plan))
    ]


def _fp8(plan: LaunchPlan) -> list[str]:
    """If model.fp8 is set, return a line on what it changes in the chosen combination."""
    if not plan.config.model.fp8:
        return []
    situation = situation_of(plan)
    chosen = choose(situation)
    section = plan.config.model.model_copy(update={"fp8": False})
    in_bf16 = replace(situation, config=plan.config.model_copy(update={"model": section}))
    both = {"FP8": chosen, "bf16": evaluate(in_bf16, chosen.combination, is_allowed=True)}
    values = (
        f"{name} {one.peak.peak_gib:.1f} GiB" + ("" if one.tokens_per_sec is None else f" and {one.tokens_per_sec:,.0f} tokens/s")
        for name, one in both.items()
    )
    return [f"model.fp8, for the chosen row: {', '.join(values)}. Its speed and memory are assumptions: no GPU was measured."]


def _stages(plan: LaunchPlan) -> list[str]:
    peak = plan.peak
    if peak is None:
        return ["a plan of an earlier launcher has no peak memory"]
    head = ("GiB", "states", "buckets", "activations", "gathered", "gradients", "temporary", "sum")
    rows = []
    for stage in peak.stages:
        sizes = (peak.states_gib, peak.buckets_gib, stage.activations_gib, stage.gathered_gib, stage.gradients_gib)
        total = peak.states_gib + peak.buckets_gib + stage.total_gib
        rows.append((stage.name.removesuffix(" step"), *(f"{gib:.2f}" for gib in (*sizes, stage.temporary_gib, total))))
    return [
        *table(head, rows),
        f"with fragmentation {peak.fragmentation_gib:.2f} and CUDA and NCCL {peak.runtime_gib:.2f}: {peak.peak_gib:.2f} GiB",
    ]


def _combinations(plan: LaunchPlan) -> list[str]:
    tried = considered(situation_of(plan))
    head = ("", "micro-batch", "recomputed", "layers", "Liger", "hpZ", "offload", "peak GiB", "tokens/s", "$/M tokens")
    rows = [_combination_row(plan, one) for one in _shown(plan, tried)]
    same = [i for i, name in enumerate(head) if name and len(rows) > 1 and len({row[i] for row in rows}) == 1]
    lines = table(_without(head, same), [_without(row, same) for row in rows])
    if same:
        lines += wrap([f"the same in all rows: {', '.join(f'{head[i]} {rows[0][i]}' for i in same)}"], 0)
    if plan.topology.device == "cuda":
        device_gib = plan.memory.device_gib
        share = f"{USABLE_SHARE:.0%}" if tried[0].peak.is_measured else f"{PREFERRED_SHARE:.0%}, or else {USABLE_SHARE:.0%},"
        limit = "GPUs of unknown memory" if device_gib is None else f"{share} of {device_gib:.0f} GiB"
        marks = (
            f"* chosen: the fastest that the settings allow and that fits into {limit}; within 2% the smallest peak. "
            "- does not fit. + needs its own settings. Speeds are predictions that order the rows."
        )
        lines += wrap([marks], 0)
    return lines


def _without(cells: Sequence[str], left_out: Sequence[int]) -> list[str]:
    return [cell for i, cell in enumerate(cells) if i not in left_out]


def _shown(plan: LaunchPlan, tried: Sequence[Considered]) -> list[Considered]:
    """Return at most _MOST_ROWS rows, including the chosen one and rows with different settings."""
    kept = [one for one in tried if _is_chosen(plan, one) or not one.is_allowed]
    rest = [one for one in tried if one not in kept][: max(0, _MOST_ROWS - len(kept))]
    return [one for one in tried if one in kept or one in rest]


def _combination_row(plan: LaunchPlan, one: Considered) -> tuple[str, ...]:
    combination, usd = one.combination, _usd(plan, one)
    mark = "*" if _is_chosen(plan, one) else "-" if not one.fits else "" if one.is_allowed else "+"
    offload = {"none": "none", "cpu": "optimizer", "nvme": "optimizer on NVMe"}[combination.offload_optimizer]
    if combination.offload_params != "none":
        offload = "all" if combination.offload_params == "cpu" else "all on NVMe"
    return (
        mark,
        str(combination.micro_batch_size),
        combination.checkpointing,
        combination.layers,
        "yes" if combination.liger else "no",
        "-" if combination.hpz_ranks == 1 else str(combination.hpz_ranks),
        offload,
        f"{one.peak.peak_gib:.1f}",
        "-" if one.tokens_per_sec is None else f"{one.tokens_per_sec:,.0f}",
        "-" if usd is None else f"{usd:.2f}",
    )


def _is_chosen(plan: LaunchPlan, one: Considered) -> bool:
    is_same_pass = (one.combination.micro_batch_size, one.combination.checkpointing) == (
        plan.batch.micro_batch_size,
        plan.activation_checkpointing,
    )
    return is_same_pass and one.is_allowed


def _usd(plan: LaunchPlan, one: Considered) -> float | None:
    if plan.price is None or not one.tokens_per_sec:
        return None
    return plan.topology.world_size * plan.price.usd_per_gpu_hour / 3600 / one.tokens_per_sec * 1e6


def _layers(plan: LaunchPlan) -> str:
    """Return how layers are gathered and computed, if this differs from DeepSpeed's and PyTorch's default."""
    if plan.config.model.compile:
        return "layers are compiled (model.compile)"
    return "layers are gathered as a whole (deepspeed.whole_layers)" if plan.config.deepspeed.whole_layers else ""


def _recomputed(plan: LaunchPlan) -> str:
    layers = plan.activation_checkpointing
    if layers == "none":
        return "no layer is recomputed"
    return "all layers are recomputed" if layers == "all" else f"{layers.replace('every', 'one layer in')} is recomputed"
