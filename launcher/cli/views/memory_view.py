"""Lines for the user about a plan's peak memory, and about the combinations of settings that the plan considered."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.cli.formatting import table, wrap
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import situation_of
from launcher.plan.quantities import format_count
from launcher.plan.sizing.combinations import PREFERRED_SHARE, USABLE_SHARE, Considered, rank_combinations
from launcher.plan.sizing.kernels import describe_liger

_MOST_ROWS = 16
_STAGE_LEGEND = (
    "Rows are stages of a step, with the memory of one rank; the peak is the largest sum. buckets: what DeepSpeed communicates "
    "at once. activations: kept for the backward pass. gathered: weights of the layers that compute. gradients: those of a layer "
    "before they are divided. temporary: needed within a layer or a part of the loss."
)
_COMBINATION_LEGEND = (
    "micro-batch: rows that a rank computes at once. recomputed: layers that the backward pass computes again, to save memory. "
    "compiled: model.compile, whose speed is not verified. Liger: fused kernels. hpZ: ranks of a node that hold the weights a "
    "second time. offload: what main memory holds. $/M tokens: dollars per million tokens."
)


def peak_line(plan: LaunchPlan) -> str:
    """Return a rank's peak memory by part, and the settings that decide it."""
    peak, stage, device_gib = plan.peak, plan.peak.largest, plan.memory.device_gib
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
    layers = {"none": "no layer is recomputed", "all": "all layers are recomputed"}
    settings = (
        layers.get(plan.checkpointing, f"{plan.checkpointing.replace('every', 'one layer in')} is recomputed"),
        "layers are compiled (model.compile)" if plan.config.model.compile else "",
        describe_liger(plan.config, plan.model, plan.topology.device, plan.liger),
    )
    total = f"{peak.peak_gib:.2f}{of} GiB per rank{basis}, highest in the {stage.name} stage"
    return f"{total}: {sizes or 'under 5 MiB each'}; {', '.join(filter(None, settings))}"


def tight_note(plan: LaunchPlan) -> str:
    """Return a note if the estimated peak leaves a GPU no margin; empty if there is a margin or the memory is unknown."""
    peak_gib, device_gib = plan.peak.peak_gib, plan.memory.device_gib
    if plan.topology.device != "cuda" or device_gib is None or peak_gib <= USABLE_SHARE * device_gib:
        return ""
    return (
        f"on {format_count(plan.topology.world_size, 'rank')} the estimated peak of {peak_gib:.0f} GiB leaves less than "
        f"{1 - USABLE_SHARE:.0%} of a GPU's {device_gib:.0f} GiB: use more ranks, deepspeed=zero3_offload, or a smaller "
        "data.max_length"
    )


def why_lines(plan: LaunchPlan) -> list[str]:
    """Return tables of the plan's memory in each stage of a step, and of the considered combinations."""
    peak = plan.peak
    head = ("GiB", "states", "buckets", "activations", "gathered", "gradients", "temporary", "sum")
    rows = []
    for stage in peak.stages:
        sizes = [peak.states_gib, peak.buckets_gib, stage.activations_gib, stage.gathered_gib, stage.gradients_gib]
        sizes += [stage.temporary_gib, peak.states_gib + peak.buckets_gib + stage.total_gib]
        rows.append((stage.name.removesuffix(" step"), *(f"{gib:.2f}" for gib in sizes)))
    total = f"with fragmentation {peak.fragmentation_gib:.2f} and CUDA and NCCL {peak.runtime_gib:.2f}: {peak.peak_gib:.2f} GiB"
    stages = [*table(head, rows), total, *wrap([_STAGE_LEGEND], 0)]
    return ["", *stages, "", *_combinations(plan), *wrap([_COMBINATION_LEGEND], 0)]


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
        for one in rank_combinations(situation_of(plan))
    ]


def _combinations(plan: LaunchPlan) -> list[str]:
    """Return a table of at most _MOST_ROWS combinations: the chosen one, those with other settings, and the fastest others."""
    tried = rank_combinations(situation_of(plan))
    kept = [one for one in tried if _is_chosen(plan, one) or not one.is_allowed]
    kept += [one for one in tried if one not in kept][: max(0, _MOST_ROWS - len(kept))]
    head = ("", "micro-batch", "recomputed", "compiled", "Liger", "hpZ", "offload", "peak GiB", "tokens/s", "$/M tokens")
    rows = [_combination_row(plan, one) for one in tried if one in kept]
    same = [i for i, name in enumerate(head) if name and len(rows) > 1 and len({row[i] for row in rows}) == 1]
    kept_columns = [i for i in range(len(head)) if i not in same]
    lines = table([head[i] for i in kept_columns], [[row[i] for i in kept_columns] for row in rows])
    if same:
        lines += wrap([f"the same in all rows: {', '.join(f'{head[i]} {rows[0][i]}' for i in same)}"], 0)
    if plan.topology.device == "cuda":
        device_gib = plan.memory.device_gib
        share = f"{USABLE_SHARE:.0%}" if plan.peak.is_measured else f"{PREFERRED_SHARE:.0%}, or else {USABLE_SHARE:.0%},"
        limit = "GPUs of unknown memory" if device_gib is None else f"{share} of {device_gib:.0f} GiB"
        marks = (
            f"* chosen: the fastest that the settings allow and that fits into {limit}; within 2% the smallest peak. "
            "- does not fit. + needs its own settings. Speeds are predictions that order the rows."
        )
        lines += wrap([marks], 0)
    return lines


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
        "yes" if combination.compiled else "no",
        "yes" if combination.liger else "no",
        "-" if combination.hpz_ranks == 1 else str(combination.hpz_ranks),
        offload,
        f"{one.peak.peak_gib:.1f}",
        "-" if one.tokens_per_sec is None else f"{one.tokens_per_sec:,.0f}",
        "-" if usd is None else f"{usd:.2f}",
    )


def _is_chosen(plan: LaunchPlan, one: Considered) -> bool:
    settings = (one.combination.micro_batch_size, one.combination.checkpointing)
    return one.is_allowed and settings == (plan.batch.micro_batch_size, plan.checkpointing)


def _usd(plan: LaunchPlan, one: Considered) -> float | None:
    if plan.price is None or not one.tokens_per_sec:
        return None
    return plan.topology.world_size * plan.price.usd_per_gpu_hour / 3600 / one.tokens_per_sec * 1e6
