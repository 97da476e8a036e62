"""The verb plan: the decisions of a run's plan, its notes and warnings, and the combinations of settings that it considered."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launcher import facts
from launcher.cli import data
from launcher.cli.accounts import check_wandb
from launcher.cli.render import terminal
from launcher.cli.render.sections import Commands, Part, Rows, Section, Table, Text
from launcher.cli.start_run import (
    choose_run_dir,
    device_note,
    estimate_run_speed,
    gather_facts,
    location_warning,
    node_devices,
    plan_with_free_name,
)
from launcher.cli.verbs import flags_of
from launcher.clusters.backends import Cluster, cluster_for, describe_answers
from launcher.clusters.preflight import disk_note, push_note
from launcher.config.compose import Composed, require_distinct_runs, run_hydra
from launcher.models.found_model import find_model
from launcher.plan.flops import FAMILIES, missing_sizes, train_flops
from launcher.plan.launch_plan import LaunchPlan, ModelFacts
from launcher.plan.plan_checks import find_warnings
from launcher.plan.planner import plan_fewest_nodes, sizing_inputs
from launcher.plan.quantities import format_count, format_size
from launcher.plan.sizing.combinations import PREFERRED_SHARE, USABLE_SHARE, CombinationEstimate, rank_combinations
from launcher.plan.sizing.layers import describe_liger
from launcher.plan.steps import single_step_warning
from launcher.plan.throughput import SpeedEstimate
from launcher.shell_commands import launcher_command, short_path

# Columns of the labels of a plan in a terminal.
LABEL_COLUMNS = 11
# The fraction of truncated tokens above which a note is shown.
MIN_TRUNCATED_FRAC = 0.01
# Each unit with its number per hour.
_TIME_UNITS = ((1, "hours"), (60, "minutes"), (3600, "seconds"))
_MOST_COMBINATIONS = 16
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


def show_plans(arguments: argparse.Namespace) -> int:
    """Print the plan of a command line or, with -m, one per job; nothing is started."""
    taken_names: set[str] = set()
    for composed in compose_jobs("plan", arguments.overrides):
        with composed.located():
            _show_plan(composed, arguments, taken_names)
    return 0


def compose_jobs(verb: str, tokens: Sequence[str]) -> list[Composed]:
    """Compose the settings of a command line: one job or, with -m, several, each with a run of its own."""
    jobs = run_hydra(tokens, flags_of(verb))
    require_distinct_runs(jobs)
    return jobs


def _show_plan(composed: Composed, arguments: argparse.Namespace, taken_names: set[str]) -> None:
    cluster = cluster_for(composed.config.cluster.kind)
    node = node_devices(composed, cluster)
    config = facts.resolve_settings(composed.config, node)
    found = find_model(config.model)
    plan = plan_with_free_name(config, gather_facts(config, found, composed, node, runs_code=False), taken_names)
    taken_names.add(plan.run_name)
    notes = (
        device_note(plan, cluster),
        disk_note(plan),
        found.weights_note,
        data.summarize_findings(plan, fatal=True),
        composed.origins.dropped_note(),
    )
    name, name_warning = config.run.name, None
    if name is not None and (run := choose_run_dir(config, name)).root.exists():
        look = launcher_command("status", short_path(run.root))
        name_warning = f"train will be refused: the run {name} exists already; look at it with {look}, or choose another run.name"
    own_warnings = (location_warning(plan), name_warning)
    speed = estimate_run_speed(plan, node)
    if arguments.json:
        # What the lines show in addition to a plan's file.
        values = {
            **json.loads(plan.to_json()),
            "checkpoint_gib": round(plan.checkpoint_bytes / 2**30, 3),
            "estimate": asdict(speed),
            "warnings": _list_warnings(plan, own_warnings),
            "notes": _list_notes(plan, notes),
            **({"considered": list_combinations(plan)} if arguments.why else {}),
        }
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return
    parts: list[Part] = [plan_rows(plan, *notes, own_warnings=own_warnings, speed=speed)]
    if arguments.why:
        parts += explain_sizes(plan)
    # What a scheduler would get, or one line on how to see it.
    script = cluster.preview(plan)
    if script is None:
        parts += [Rows([("script", "none: this machine starts the ranks itself")])] if arguments.script else []
    elif arguments.script:
        parts.append(Section("", [Commands(script.rstrip().split("\n"))]))
    elif (count := script.count("\n")) > 1:
        # A script has more than a few lines.
        parts.append(Rows([("script", f"plan --script shows what the scheduler gets ({count} lines)")]))
    elif script:
        parts.append(Commands(script.rstrip().split("\n")))
    terminal.show(*parts, label_columns=LABEL_COLUMNS)


def print_plan(plan: LaunchPlan, cluster: Cluster) -> None:
    """Print the plan of a run that is about to start."""
    notes = (
        device_note(plan, cluster),
        disk_note(plan),
        push_note(plan),
        check_wandb(plan.config),
        find_model(plan.config.model).weights_note,
        data.summarize_findings(plan, fatal=False),
    )
    terminal.show(plan_rows(plan, *notes, own_warnings=(location_warning(plan),)), label_columns=LABEL_COLUMNS)


def plan_rows(
    plan: LaunchPlan, *notes: str | None, own_warnings: Sequence[str | None] = (), speed: SpeedEstimate | None = None
) -> Rows:
    """Return a plan's decisions; `notes` and `own_warnings` come from this machine."""
    rows = [*_list_inputs(plan), *_list_training(plan), *_list_memory(plan), *_list_outputs(plan), *_list_costs(plan, speed)]
    rows += [("warning", warning) for warning in _list_warnings(plan, own_warnings)]
    rows += [("note", note) for note in _list_notes(plan, notes)]
    limits = []
    if plan.limits.max_seconds is not None:
        limits.append(f"{plan.limits.max_seconds / 3600:.2f} hours")
    if plan.limits.max_gpu_seconds is not None:
        hours = plan.limits.max_gpu_seconds / 3600 / plan.topology.world_size
        limits.append(f"${plan.config.run.max_usd:,.2f}, which is {hours:.2f} hours of {_describe_workers(plan)}")
    return Rows([*rows, *([("limit", f"saves and stops after {' or '.join(limits)}")] if limits else [])])


def remarks(plan: LaunchPlan, *notes: str | None) -> list[str]:
    """Return a plan's warnings and notes, each prefixed with its kind; `notes` come from this machine."""
    return [*(f"warning: {line}" for line in _list_warnings(plan, ())), *(f"note: {line}" for line in _list_notes(plan, notes))]


def _list_inputs(plan: LaunchPlan) -> list[tuple[str, str]]:
    """Return where the run is, and what it begins with."""
    config = plan.config
    rows = [("run", f"{plan.run_name} in {short_path(plan.run_dir)}")]
    if plan.provenance.run_file is not None:
        rows.append(("file", str(plan.provenance.run_file)))
    count = plan.model.num_params
    if plan.model.num_params_exact:
        parameters = f"{count:,}"
    else:
        # Round first: 999,990,000 is 1.0 billion.
        billions = round(count / 1e6, 1) >= 1000
        parameters = f"about {count / 1e9:.1f} billion" if billions else f"about {count / 1e6:.1f} million"
    weights = "random weights" if config.model.init == "random" else (config.model.path or "")
    rows.append(("model", f"{config.model.name}: {parameters} parameters, {config.model.dtype}, from {weights}"))
    if (lineage := plan.lineage) is not None:
        origins = (f"run {origin.run_name} at step {origin.step}" for origin in (lineage, *lineage.ancestors))
        rows.append(("lineage", f"begins with {', which began with '.join(origins)}"))
    if (built := plan.data) is None:
        command = launcher_command("data", *plan.provenance.overrides)
        about = f"not built yet; build it and see it with: {command}"
    else:
        most = config.data.max_length
        width = min(most, round(built.num_tokens / built.num_rows / (1 - built.padding_frac)))
        longest = f"{width:,} tokens" + (f" (data.max_length is {most:,})" if width < most else "")
        trained = built.num_trained_tokens / max(1, built.num_tokens)
        about = f"{format_count(built.num_rows, 'row')} of up to {longest}, {built.num_tokens:,} tokens ({trained:.0%} trained)"
        about += f", {format_count(built.num_eval_rows, 'held-out row')}"
    rows.append(("data", f"{config.data.name}: {about}"))
    sets = []
    for one in config.eval.all_sets:
        built_set = plan.eval_sets.get(one.name)
        num_rows = None if built_set is None else min(one.max_rows or built_set.num_rows, built_set.num_rows)
        sets.append(f"{one.name}: {'not built yet' if num_rows is None else format_count(num_rows, 'row')}")
    rows += [("evaluation", "; ".join(sets))] if sets else []
    return rows + ([("answers", describe_answers(plan))] if config.eval.answers_every else [])


def _list_training(plan: LaunchPlan) -> list[tuple[str, str]]:
    """Return the ranks, and what they do in a step and between steps."""
    config, batch, topology = plan.config, plan.batch, plan.topology
    # GPUs of unknown type have the name "gpu".
    gpu = f" {plan.gpu_name}" if plan.gpu_name not in ("", "gpu") else ""
    nodes = f"{format_count(topology.nodes, 'node')} x {topology.ranks_per_node}{gpu}"
    tokens = f"about {batch.tokens_per_step:,}" if batch.tokens_per_step else f"up to {batch.max_tokens_per_step:,}"
    factors = (
        f"{batch.micro_batch_size} micro-batch x {batch.accumulation} accumulation x {format_count(topology.data_ranks, 'rank')}"
    )
    steps = f"{batch.max_steps:,}" if batch.max_steps is not None else "known when the data is built"
    epochs = f" ({batch.epochs:g} {'epoch' if batch.epochs == 1 else 'epochs'})" if batch.epochs is not None else ""
    evaluation = f"every {config.eval.every} and at the end" if config.eval.every else "at the end"
    save_every = config.checkpoint.save_every
    saves = f"every {save_every} and at the end" if save_every else "at the end"
    warmup = format_count(config.optim.warmup_steps, "warm-up step")
    return [
        ("ranks", f"{topology.world_size} on {topology.device} ({nodes}), {topology.backend}, DeepSpeed ZeRO-3"),
        ("batch", f"{format_count(batch.global_batch_size, 'row')} = {factors}; {tokens} tokens per step"),
        ("steps", f"{steps}{epochs}; evaluation {evaluation}; checkpoint {saves}"),
        ("optimizer", f"{config.optim.name}, lr {config.optim.lr:g}, {config.optim.schedule}, {warmup}"),
    ]


def _list_memory(plan: LaunchPlan) -> list[tuple[str, str]]:
    """Return the size of the model states: on each rank's device, offloaded, and in main memory; and the peak."""
    memory, deepspeed = plan.memory, plan.config.deepspeed
    sizes = {"weights": memory.weights_gib, "gradients": memory.gradients_gib, "optimizer": memory.optimizer_gib}
    is_moved = {"weights": deepspeed.offload_params != "none"}
    is_moved |= dict.fromkeys(("gradients", "optimizer"), deepspeed.offload_optimizer != "none")
    # Offloaded states are listed separately, so a zero in a list is a size that was rounded to zero.
    kept = ", ".join(f"{name} {_format_gib(gib)}" for name, gib in sizes.items() if not is_moved[name])
    moved = ", ".join(f"{name} {_format_gib(gib)}" for name, gib in sizes.items() if is_moved[name])
    of = f" of {memory.device_gib:.0f} GiB" if memory.device_gib else ""
    states = f"model states {_format_gib(memory.per_rank_gib)}{of} per rank ({kept})" if kept else "no model states on the GPU"
    parts = [states, *([f"offloaded per rank: {moved}"] if moved else [])]
    parts += [f"{_format_gib(memory.host_per_node_gib)} of main memory per node"] if memory.host_per_node_gib else []
    if (smallest := plan_fewest_nodes(plan)) is not None:
        parts.append(f"{_format_gib(smallest.memory.per_rank_gib)} per rank on {smallest.topology.world_size}")
    return [("memory", "; ".join(parts)), ("peak", describe_peak(plan))]


def _format_gib(gib: float) -> str:
    """Format a size, which a plan stores in thousandths of a GiB: fewer than ten thousandths are not meaningful."""
    return format_size(round(gib * 2**30)) if gib >= 0.01 else "under 10 MiB"


def describe_peak(plan: LaunchPlan) -> str:
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


def _list_outputs(plan: LaunchPlan) -> list[tuple[str, str]]:
    """Return what the run writes, and where."""
    config, checkpoint, tracking = plan.config, plan.config.checkpoint, plan.config.tracking
    kept = ["the newest" if checkpoint.keep_last == 1 else f"the newest {checkpoint.keep_last}"]
    if checkpoint.keep_best:
        kept.append("the best" if checkpoint.keep_best == 1 else f"the best {checkpoint.keep_best}")
    if checkpoint.keep_every:
        kept.append(f"every {checkpoint.keep_every} steps")
    retention = f"{' and '.join(kept)} {'is' if kept == ['the newest'] else 'are'} kept"
    saving = "training waits while one is written"
    if plan.saving.background:
        saving = f"written in the background from {_format_gib(plan.saving.host_gib_per_node)} of main memory per node"
    rows = [("checkpoint", f"{format_size(plan.checkpoint_bytes)} each, {retention}; {saving}")]
    if checkpoint.mirror:
        rows.append(("mirror", f"every checkpoint is copied to {checkpoint.mirror}"))
    if config.export.push_to_hub:
        rows.append(("export", f"the Hugging Face folder is pushed to {config.export.push_to_hub}"))
    if tracking.kind == "none" or tracking.mode == "disabled":
        return [*rows, ("tracking", "metrics.jsonl only")]
    project = f"{tracking.entity}/{tracking.project}" if tracking.entity else tracking.project
    return [*rows, ("tracking", f"W&B project {project}, mode {tracking.mode}, id {plan.wandb_id}")]


def _list_costs(plan: LaunchPlan, speed: SpeedEstimate | None) -> list[tuple[str, str]]:
    """Return the expected speed and hours, and the cost."""
    rows, total = [] if speed is None else speed_rows(speed), ""
    if speed is not None and speed.usd is not None:
        total = f"{_format_range(speed.usd, '$')} for the training steps; "
    if (price := plan.price) is not None:
        hourly = f"${plan.topology.world_size * price.usd_per_gpu_hour:,.2f} an hour"
        hourly = f"{hourly} = {_describe_workers(plan)} x ${price.usd_per_gpu_hour:.2f}"
        assumed = f", assumed ({price.assumption}; cluster.price_per_gpu_hour sets yours)" if price.assumption is not None else ""
        rows.append(("cost", f"{total}{hourly}{assumed}"))
    elif plan.topology.device == "cuda":
        rows.append(("cost", f"{total}not known: set cluster.price_per_gpu_hour to what a GPU costs you"))
    return rows


def speed_rows(speed: SpeedEstimate) -> list[tuple[str, str]]:
    """Return the expected tokens per second and hours with their basis, or why there are none."""
    if speed.tokens_per_sec is None or speed.tokens_per_sec_per_gpu is None or speed.mfu is None:
        return [("speed", f"no estimate: {speed.basis}")]
    low, high = speed.mfu
    rates = f"{_format_range(speed.tokens_per_sec)} tokens/s ({_format_range(speed.tokens_per_sec_per_gpu)} per GPU)"
    duration = "known when the data is built"
    if speed.hours is not None:
        per_hour, unit = next(((n, unit) for n, unit in _TIME_UNITS if speed.hours[1] * n >= 1), _TIME_UNITS[-1])
        several = _format_range((speed.hours[0] * per_hour, speed.hours[1] * per_hour))
        duration = f"{several} {unit} of training steps; start, evaluation and checkpoints come on top"
    return [("speed", f"{rates}: MFU {low:.0%} to {high:.0%}, {speed.basis}"), ("time", duration)]


def _format_range(values: tuple[float, float], currency: str = "") -> str:
    """Return a range with two digits for each end: whole numbers from 10, and whole cents."""

    def rounded(value: float) -> str:
        digits = 1 - math.floor(math.log10(value)) if value > 0 else 0
        shown = 2 if currency and digits > 0 else max(0, digits)
        return f"{currency}{round(value, digits):,.{shown}f}"

    low, high = map(rounded, values)
    return low if low == high else f"{low} to {high}"


def _describe_workers(plan: LaunchPlan) -> str:
    return format_count(plan.topology.world_size, "GPU" if plan.topology.device == "cuda" else "CPU rank")


def _list_warnings(plan: LaunchPlan, own_warnings: Sequence[str | None]) -> list[str]:
    overfull = ""
    if _is_overfull(plan):
        gpus = ", or name the GPUs in cluster.gpu_type" if plan.topology.device == "cpu" else ""
        overfull = (
            f"model states take {plan.memory.host_per_node_gib:.0f} GiB of main memory per node, which has "
            f"{plan.memory.node_gib:.0f} GiB: they do not fit; use more nodes or a smaller model{gpus}"
        )
    return [warning for warning in (overfull, *find_warnings(plan), *own_warnings) if warning]


def _is_overfull(plan: LaunchPlan) -> bool:
    """Return whether the model states are known not to fit in main memory."""
    return plan.memory.node_gib is not None and plan.memory.host_per_node_gib > plan.memory.node_gib


def _list_notes(plan: LaunchPlan, own_notes: Sequence[str | None]) -> list[str]:
    """Return notes to read before paying for the run, `own_notes` last."""
    config, built, steps = plan.config, plan.data, plan.batch.max_steps
    # If the states do not even fit, the note about saving does not matter.
    notes = [plan.saving.note] if plan.saving.note and not _is_overfull(plan) else []
    if (isolation := plan.model.isolation) is not None and isolation.outcome == "unknown":
        condition = "packed documents affect each other" if config.data.packing else "the model sees later tokens"
        notes.append(f"whether {condition} is measured on the loaded model, before step 1 ({isolation.detail})")
    smallest = plan_fewest_nodes(plan)
    notes += [note for sized in (plan, smallest) if sized is not None and (note := _describe_tight_memory(sized))]
    is_single = built is not None and single_step_warning(config.train, built.num_rows, plan.topology.data_ranks) is not None
    is_scheduled = config.optim.schedule != "constant" and not is_single
    if steps is not None and is_scheduled and config.optim.warmup_steps >= steps:
        warmup = format_count(config.optim.warmup_steps, "step")
        notes.append(f"the warm-up of {warmup} does not end within {steps}: lower optim.warmup_steps")
    if built is not None and not built.num_eval_rows and (config.data.eval_fraction or config.data.eval_path):
        notes.append("no document is held out, so nothing is evaluated: raise data.eval_fraction")
    if built is not None and (lost := built.truncated_frac) > MIN_TRUNCATED_FRAC:
        notes.append(
            f"{format_count(built.truncated_docs, 'document')} cut, losing {lost:.0%} of the tokens: raise data.max_length, "
            "or data.long_documents=split"
        )
    return [note for note in (*notes, _describe_unknown_flops(plan.model), *own_notes) if note]


def _describe_tight_memory(plan: LaunchPlan) -> str:
    """Return a note if the estimated peak leaves a GPU no margin; empty if there is a margin or the memory is unknown."""
    peak_gib, device_gib = plan.peak.peak_gib, plan.memory.device_gib
    if plan.topology.device != "cuda" or device_gib is None or peak_gib <= USABLE_SHARE * device_gib:
        return ""
    return (
        f"on {format_count(plan.topology.world_size, 'rank')} the estimated peak of {peak_gib:.0f} GiB leaves less than "
        f"{1 - USABLE_SHARE:.0%} of a GPU's {device_gib:.0f} GiB: use more ranks, deepspeed=zero3_offload, or a smaller "
        "data.max_length"
    )


def _describe_unknown_flops(model: ModelFacts) -> str:
    """Return a note on an architecture whose FLOPs cannot be counted; empty if they can."""
    if train_flops(model) is not None:
        return ""
    left_out = "perf/tflops_per_gpu and perf/mfu are left out"
    if model.model_type not in FAMILIES:
        architecture = model.config.get("model_type", "a model without model_type")
        return f"the launcher does not know the layers of {architecture}: the peak is a guess from its sizes, and {left_out}"
    if missing := missing_sizes(model):
        return f"config.json of this {model.model_type} lacks {', '.join(missing)}: the peak is a guess, and {left_out}"
    return f"the FLOPs of this kind of {model.model_type} are not known: {left_out}"


def explain_sizes(plan: LaunchPlan) -> list[Section]:
    """Return tables of a rank's memory in each stage of a step, and of the combinations of settings that the plan considered."""
    peak = plan.peak
    header = ("GiB", "states", "buckets", "activations", "gathered", "gradients", "temporary", "sum")
    rows = []
    for stage in peak.stages:
        sizes = [peak.states_gib, peak.buckets_gib, stage.activations_gib, stage.gathered_gib, stage.gradients_gib]
        sizes += [stage.temporary_gib, peak.states_gib + peak.buckets_gib + stage.total_gib]
        rows.append((stage.name.removesuffix(" step"), *(f"{gib:.2f}" for gib in sizes)))
    total = f"with fragmentation {peak.fragmentation_gib:.2f} and CUDA and NCCL {peak.runtime_gib:.2f}: {peak.peak_gib:.2f} GiB"
    stages = Section("", [Table(header, rows), Text(total), Text(_STAGE_LEGEND)])
    return [stages, Section("", [*_compare_combinations(plan), Text(_COMBINATION_LEGEND)])]


def _compare_combinations(plan: LaunchPlan) -> list[Part]:
    """Return a table of at most _MOST_COMBINATIONS: the chosen one, those with other settings, and the fastest others."""
    tried = rank_combinations(sizing_inputs(plan))
    kept = [one for one in tried if _is_chosen(plan, one) or not one.is_allowed]
    kept += [one for one in tried if one not in kept][: max(0, _MOST_COMBINATIONS - len(kept))]
    header = ("", "micro-batch", "recomputed", "compiled", "Liger", "hpZ", "offload", "peak GiB", "tokens/s", "$/M tokens")
    rows = []
    for one in (one for one in tried if one in kept):
        combination, usd = one.combination, _cost_per_million(plan, one)
        offload = {"none": "none", "cpu": "optimizer", "nvme": "optimizer on NVMe"}[combination.offload_optimizer]
        if combination.offload_params != "none":
            offload = "all" if combination.offload_params == "cpu" else "all on NVMe"
        rows.append(
            (
                "*" if _is_chosen(plan, one) else "-" if not one.fits else "" if one.is_allowed else "+",
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
        )
    same = [i for i, name in enumerate(header) if name and len(rows) > 1 and len({row[i] for row in rows}) == 1]
    differing = [i for i in range(len(header)) if i not in same]
    parts: list[Part] = [Table([header[i] for i in differing], [[row[i] for i in differing] for row in rows])]
    if same:
        parts.append(Text(f"the same in all rows: {', '.join(f'{header[i]} {rows[0][i]}' for i in same)}"))
    if plan.topology.device == "cuda":
        device_gib = plan.memory.device_gib
        share = f"{USABLE_SHARE:.0%}" if plan.peak.is_measured else f"{PREFERRED_SHARE:.0%}, or else {USABLE_SHARE:.0%},"
        limit = "GPUs of unknown memory" if device_gib is None else f"{share} of {device_gib:.0f} GiB"
        marks = (
            f"* chosen: the fastest that the settings allow and that fits into {limit}; within 2% the smallest peak. "
            "- does not fit. + needs its own settings. Speeds are predictions that order the rows."
        )
        parts.append(Text(marks))
    return parts


def list_combinations(plan: LaunchPlan) -> list[dict[str, Any]]:
    """Return the considered combinations as JSON values."""
    return [
        {
            **asdict(one.combination),
            "peak_gib": one.peak.peak_gib,
            "tokens_per_sec": one.tokens_per_sec,
            "usd_per_million_tokens": _cost_per_million(plan, one),
            "fits": one.fits,
            "is_allowed": one.is_allowed,
            "is_chosen": _is_chosen(plan, one),
        }
        for one in rank_combinations(sizing_inputs(plan))
    ]


def _is_chosen(plan: LaunchPlan, one: CombinationEstimate) -> bool:
    settings = (one.combination.micro_batch_size, one.combination.checkpointing)
    return one.is_allowed and settings == (plan.batch.micro_batch_size, plan.checkpointing)


def _cost_per_million(plan: LaunchPlan, one: CombinationEstimate) -> float | None:
    """Return the dollars for a million tokens with a combination, or None if its speed or the price is not known."""
    if plan.price is None or not one.tokens_per_sec:
        return None
    return plan.topology.world_size * plan.price.usd_per_gpu_hour / 3600 / one.tokens_per_sec * 1e6
