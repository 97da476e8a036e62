"""Lines for the user about a plan, and about the runs that were started from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from launcher.cli.formatting import short, table
from launcher.cli.views.memory_view import peak_line, tight_note, why_values
from launcher.clusters.backends import describe_answers
from launcher.config.sections.train import CheckpointSection
from launcher.errors import ConfigError
from launcher.plan.flops import FAMILIES, missing_sizes, train_flops
from launcher.plan.launch_plan import LaunchPlan, Lineage, ModelFacts
from launcher.plan.plan_checks import warnings
from launcher.plan.planner import fewest
from launcher.plan.quantities import format_count, format_size
from launcher.plan.steps import single_step_warning
from launcher.plan.throughput import SpeedEstimate
from launcher.shell_commands import launcher_command
from launcher.tracking.costs import hosted_training, training_tokens

# Each unit with its number per hour.
_TIME_UNITS = ((1, "hours"), (60, "minutes"), (3600, "seconds"))
# Width of the labels of `plan_lines`.
LABEL_WIDTH = 11
# The fraction of truncated tokens above which a note is shown.
MIN_TRUNCATED_FRAC = 0.01
# The upper bound of the memory that is shown: the plan of another user's run may contain any number.
_MOST_GIB = 1e12


def plan_lines(
    plan: LaunchPlan, *notes: str | None, own_warnings: Sequence[str | None] = (), speed: SpeedEstimate | None = None
) -> list[str]:
    """Return a plan's decisions, a label and a value per line; `notes` and `own_warnings` come from this machine."""
    config, batch = plan.config, plan.batch
    kinds = "random weights" if config.model.init == "random" else (config.model.path or "")
    rows = [
        ("run", f"{plan.run_name} in {short(plan.run_dir)}"),
        *([("file", _run_file(plan))] if plan.provenance.run_file is not None else []),
        ("model", f"{config.model.name}: {_parameters(plan)} parameters, {config.model.dtype}, from {kinds}"),
        *([("lineage", _lineage(plan.lineage))] if plan.lineage is not None else []),
        ("data", _data(plan)),
        *([("evaluation", _eval_sets(plan))] if plan.config.eval.all_sets else []),
        *([("answers", describe_answers(plan))] if config.eval.answers_every else []),
        ("ranks", _ranks(plan)),
        (
            "batch",
            f"{format_count(batch.global_batch_size, 'row')} = {batch.micro_batch_size} micro-batch x "
            f"{batch.accumulation} accumulation x {format_count(plan.topology.world_size, 'rank')}; "
            f"{_tokens(plan)} tokens per step",
        ),
        ("steps", _steps(plan)),
        (
            "optimizer",
            f"{config.optim.name}, lr {config.optim.lr:g}, {config.optim.schedule}, "
            f"{format_count(config.optim.warmup_steps, 'warm-up step')}",
        ),
        ("memory", _memory(plan)),
        ("peak", peak_line(plan)),
        ("checkpoint", f"{format_size(plan.checkpoint_bytes)} each, {_retention(config.checkpoint)}; {_saving(plan)}"),
        *([("mirror", f"every checkpoint is copied to {config.checkpoint.mirror}")] if config.checkpoint.mirror else []),
        *([("export", f"the Hugging Face folder is pushed to {config.export.push_to_hub}")] if config.export.push_to_hub else []),
        ("tracking", _tracking(plan)),
        *(speed_rows(speed) if speed is not None else []),
        *([("cost", _cost(plan, speed))] if plan.topology.device == "cuda" or plan.price is not None else []),
        *([("hosted", _hosted(plan))] if plan.config.costs.hosted else []),
    ]
    rows += [("warning", warning) for warning in _all_warnings(plan, own_warnings)]
    rows += [("note", note) for note in _notes(plan, notes)]
    if limits := _limits(plan):
        rows.append(("limit", f"saves and stops after {limits}"))
    return [f"{label:<{LABEL_WIDTH}}{value}" for label, value in rows]


def plan_json(
    plan: LaunchPlan, *notes: str | None, own_warnings: Sequence[str | None], speed: SpeedEstimate, why: bool = False
) -> str:
    """Return the plan as JSON, with what `plan_lines` shows in addition to a plan's file: speed, warnings and notes.

    `why` adds the combinations that the plan considered.
    """
    shown = {
        **json.loads(plan.to_json()),
        "checkpoint_gib": round(plan.checkpoint_bytes / 2**30, 3),
        "estimate": asdict(speed),
        "warnings": _all_warnings(plan, own_warnings),
        "notes": _notes(plan, notes),
        **({"considered": why_values(plan)} if why else {}),
    }
    return json.dumps(shown, indent=2, ensure_ascii=False)


def remarks(plan: LaunchPlan, *notes: str | None) -> list[str]:
    """Return a plan's warnings and notes, each prefixed with its kind; `notes` come from this machine."""
    return [*(f"warning: {line}" for line in _all_warnings(plan, ())), *(f"note: {line}" for line in _notes(plan, notes))]


def _all_warnings(plan: LaunchPlan, own_warnings: Sequence[str | None]) -> list[str]:
    return [warning for warning in (_overfull(plan), *warnings(plan), *own_warnings) if warning]


def _limits(plan: LaunchPlan) -> str:
    limits, ranks = plan.limits, plan.topology.world_size
    hours = [f"{limits.max_seconds / 3600:.2f} hours"] if limits.max_seconds is not None else []
    if limits.max_gpu_seconds is not None:
        hours.append(
            f"${plan.config.run.max_usd:,.2f}, which is {limits.max_gpu_seconds / 3600 / ranks:.2f} hours of {_paid_for(plan)}"
        )
    return " or ".join(hours)


def _run_file(plan: LaunchPlan) -> str:
    """Return the run's file, and the files that relative paths in the settings lead to."""
    config = plan.config
    paths = {
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        **{f"data.sources[{i}].path": source.path for i, source in enumerate(config.data.sources)},
        "data.eval_path": config.data.eval_path,
        "data.chat_template": config.data.chat_template,
    }
    # A name without a file is a Hub name, and a pattern shows its folder.
    resolved = [
        f"{key} is {Path.cwd() / path}"
        for key, path in paths.items()
        if path and not path.startswith(("/", "~")) and "://" not in path and (Path(path).exists() or "*" in path)
    ]
    return "; ".join([str(plan.provenance.run_file), *resolved])


def _lineage(lineage: Lineage) -> str:
    origins = ", which began with ".join(
        f"run {origin.run_name} at step {origin.step}" for origin in (lineage, *lineage.ancestors)
    )
    return f"begins with {origins}"


def _parameters(plan: LaunchPlan) -> str:
    count = plan.model.num_params
    if plan.model.num_params_exact:
        return f"{count:,}"
    # Round first: 999,990,000 is 1.0 billion.
    return f"about {count / 1e9:.1f} billion" if round(count / 1e6, 1) >= 1000 else f"about {count / 1e6:.1f} million"


def _retention(checkpoint: CheckpointSection) -> str:
    parts = ["the newest" if checkpoint.keep_last == 1 else f"the newest {checkpoint.keep_last}"]
    if checkpoint.keep_best:
        parts.append("the best" if checkpoint.keep_best == 1 else f"the best {checkpoint.keep_best}")
    if checkpoint.keep_every:
        parts.append(f"every {checkpoint.keep_every} steps")
    return f"{' and '.join(parts)} {'is' if parts == ['the newest'] else 'are'} kept"


def _saving(plan: LaunchPlan) -> str:
    if not plan.saving.background:
        return "training waits while one is written"
    return f"written in the background from {_size(plan.saving.host_gib_per_node)} of main memory per node"


def _ranks(plan: LaunchPlan) -> str:
    topology = plan.topology
    # GPUs of unknown type have the name "gpu".
    gpu = f" {plan.gpu_name}" if plan.gpu_name not in ("", "gpu") else ""
    nodes = f"{format_count(topology.nodes, 'node')} x {topology.ranks_per_node}{gpu}"
    return f"{topology.world_size} on {topology.device} ({nodes}), {topology.backend}, DeepSpeed ZeRO-3"


def _size(gib: float) -> str:
    """Format a size, which a plan stores in thousandths of a GiB: fewer than ten thousandths are not meaningful."""
    return format_size(round(min(gib, _MOST_GIB) * 2**30)) if gib >= 0.01 else "under 10 MiB"


def _memory(plan: LaunchPlan) -> str:
    """Return the size of the model states: on each rank's device, offloaded, and in main memory."""
    memory, deepspeed = plan.memory, plan.config.deepspeed
    sizes = {"weights": memory.weights_gib, "gradients": memory.gradients_gib, "optimizer": memory.optimizer_gib}
    is_moved = {"weights": deepspeed.offload_params != "none"}
    is_moved |= dict.fromkeys(("gradients", "optimizer"), deepspeed.offload_optimizer != "none")
    # Offloaded states are listed separately, so a zero in a list is a size that was rounded to zero.
    kept = ", ".join(f"{name} {_size(gib)}" for name, gib in sizes.items() if not is_moved[name])
    moved = ", ".join(f"{name} {_size(gib)}" for name, gib in sizes.items() if is_moved[name])
    of = f" of {memory.device_gib:.0f} GiB" if memory.device_gib else ""
    parts = [f"model states {_size(memory.per_rank_gib)}{of} per rank ({kept})"] if kept else ["no model states on the GPU"]
    parts += [f"offloaded per rank: {moved}"] if moved else []
    parts += [f"{_size(memory.host_per_node_gib)} of main memory per node"] if memory.host_per_node_gib else []
    smallest = _smallest(plan)
    parts += [f"{_size(smallest.memory.per_rank_gib)} per rank on {smallest.topology.world_size}"] if smallest is not None else []
    return "; ".join(parts)


def _notes(plan: LaunchPlan, own_notes: Sequence[str | None]) -> list[str]:
    """Return notes to read before paying for the run, `own_notes` last."""
    config, data, steps = plan.config, plan.data, plan.batch.max_steps
    # If the states do not even fit, the note about saving does not matter.
    notes = [plan.saving.note] if plan.saving.note and not _overfull(plan) else []
    if (isolation := plan.model.isolation) is not None and isolation.outcome == "unknown":
        condition = "packed documents affect each other" if config.data.packing else "the model sees later tokens"
        notes.append(f"whether {condition} is measured on the loaded model, before step 1 ({isolation.detail})")
    smallest, min_workers = _smallest(plan), config.cluster.fewest_workers
    notes += [note for sized in (plan, smallest) if sized is not None and (note := tight_note(sized))]
    if smallest is not None and min_workers is not None and (least := smallest.topology.world_size) < min_workers:
        idle, of = min_workers - least, format_count(least, "rank")
        notes.append(
            f"with cluster.min_workers={min_workers}, {format_count(idle, 'worker')} can be idle: the batch of "
            f"{format_count(plan.batch.global_batch_size, 'row')} divides over {of}, not over {min_workers}"
        )
    is_single = data is not None and single_step_warning(config.train, data.num_rows, plan.topology.world_size) is not None
    is_scheduled = config.optim.schedule != "constant" and not is_single
    if steps is not None and is_scheduled and config.optim.warmup_steps >= steps:
        warmup = format_count(config.optim.warmup_steps, "step")
        notes.append(f"the warm-up of {warmup} does not end within {steps}: lower optim.warmup_steps")
    notes += _unreached(plan)
    if data is not None and not data.num_eval_rows and (config.data.eval_fraction or config.data.eval_path):
        notes.append("no document is held out, so nothing is evaluated: raise data.eval_fraction")
    if data is not None and (lost := data.truncated_frac) > MIN_TRUNCATED_FRAC:
        notes.append(
            f"{format_count(data.truncated_docs, 'document')} cut, losing {lost:.0%} of the tokens: raise data.max_length, "
            "or data.long_documents=split"
        )
    return [*notes, *_unknown_flops(plan.model), *(note for note in own_notes if note)]


def _unknown_flops(model: ModelFacts) -> list[str]:
    """Return a note on an architecture whose FLOPs cannot be counted."""
    if train_flops(model) is not None:
        return []
    left_out = "perf/tflops_per_gpu and perf/mfu are left out"
    if model.model_type not in FAMILIES:
        architecture = model.config.get("model_type", "a model without model_type")
        note = f"the launcher does not know the layers of {architecture}: the peak is a guess from its sizes, and {left_out}"
        return [note if model.num_params_exact else f"{note}; the number of parameters is a guess too"]
    if missing := missing_sizes(model):
        guess = "the peak is a guess" if model.num_params_exact else "its parameters and the peak are a guess"
        return [f"config.json of this {model.model_type} lacks {', '.join(missing)}: {guess}, and {left_out}"]
    return [f"the FLOPs of this kind of {model.model_type} are not known: {left_out}"]


def _unreached(plan: LaunchPlan) -> list[str]:
    """Return a note for each interval in a run's file that is longer than the run, as after an override of the run's length."""
    steps = plan.batch.max_steps
    if steps is None or plan.provenance.run_file is None:
        return []
    intervals = {
        "eval.every": (plan.config.eval.every, "the held-out loss is computed only before training and at the end"),
        "checkpoint.save_every": (plan.config.checkpoint.save_every, "the only checkpoint is written at the end"),
    }
    run = format_count(steps, "step")
    return [f"{key}={every} exceeds the run of {run}: {effect}" for key, (every, effect) in intervals.items() if every > steps]


def _smallest(plan: LaunchPlan) -> LaunchPlan | None:
    """Return the plan on the fewest workers with which the run continues, or None if it is this plan or the plan is old."""
    with suppress(ConfigError):
        return fewest(plan)
    return None


def _overfull(plan: LaunchPlan) -> str:
    """Return a warning if the model states do not fit in main memory; empty if they do or if this is unknown."""
    memory = plan.memory
    if memory.node_gib is None or memory.host_per_node_gib <= memory.node_gib:
        return ""
    gpus = ", or name the GPUs in cluster.gpu_type" if plan.topology.device == "cpu" else ""
    return (
        f"model states take {memory.host_per_node_gib:.0f} GiB of main memory per node, which has {memory.node_gib:.0f} GiB: "
        f"they do not fit; use more nodes or a smaller model{gpus}"
    )


def speed_rows(speed: SpeedEstimate) -> list[tuple[str, str]]:
    """Return the expected tokens per second and hours with their basis, or why there are none."""
    if speed.tokens_per_sec is None or speed.tokens_per_sec_per_gpu is None or speed.mfu is None:
        return [("speed", f"no estimate: {speed.basis}")]
    low, high = speed.mfu
    rates = f"{_between(speed.tokens_per_sec)} tokens/s ({_between(speed.tokens_per_sec_per_gpu)} per GPU)"
    duration = "known when the data is built"
    if speed.hours is not None:
        per_hour, unit = next(((n, unit) for n, unit in _TIME_UNITS if speed.hours[1] * n >= 1), _TIME_UNITS[-1])
        several = _between((speed.hours[0] * per_hour, speed.hours[1] * per_hour))
        duration = f"{several} {unit} of training steps; start, evaluation and checkpoints come on top"
    return [("speed", f"{rates}: MFU {low:.0%} to {high:.0%}, {speed.basis}"), ("time", duration)]


def _between(values: tuple[float, float], currency: str = "") -> str:
    """Return a range with two digits for each end: whole numbers from 10, and whole cents."""

    def rounded(value: float) -> str:
        digits = 1 - math.floor(math.log10(value)) if value > 0 else 0
        shown = 2 if currency and digits > 0 else max(0, digits)
        return f"{currency}{round(value, digits):,.{shown}f}"

    low, high = map(rounded, values)
    return low if low == high else f"{low} to {high}"


def _cost(plan: LaunchPlan, speed: SpeedEstimate | None) -> str:
    total = "" if speed is None or speed.usd is None else f"{_between(speed.usd, '$')} for the training steps; "
    return total + _hourly_cost(plan)


def _hourly_cost(plan: LaunchPlan) -> str:
    price = plan.price
    if price is None:
        return "not known: set cluster.price_per_gpu_hour to what a GPU costs you"
    of = f"{_paid_for(plan)} x ${price.usd_per_gpu_hour:.2f}"
    usd = f"${plan.topology.world_size * price.usd_per_gpu_hour:,.2f} an hour = {of}"
    return usd if price.assumption is None else f"{usd}, assumed ({price.assumption}; cluster.price_per_gpu_hour sets yours)"


def _hosted(plan: LaunchPlan) -> str:
    """Return the cost of a run's training tokens at hosted services."""
    tokens = training_tokens(plan)
    if tokens is None:
        return "known when the data is built"
    usd = hosted_training(plan.config.costs.hosted, tokens)
    if not usd:
        return "costs.hosted has no prices for training"
    return f"{', '.join(f'{name} ${price:,.2f}' for name, price in usd.items())} for {tokens:,} training tokens"


def _paid_for(plan: LaunchPlan) -> str:
    ranks = plan.topology.world_size
    return format_count(ranks, "GPU" if plan.topology.device == "cuda" else "CPU rank")


def _data(plan: LaunchPlan) -> str:
    data = plan.data
    if data is None:
        command = launcher_command("data", *plan.provenance.overrides)
        return f"{plan.config.data.name}: not built yet; build it and see it with: {command}"
    most = plan.config.data.max_length
    width = min(most, round(data.num_tokens / data.num_rows / (1 - data.padding_frac)))
    longest = f"{width:,} tokens" + (f" (data.max_length is {most:,})" if width < most else "")
    share = data.num_trained_tokens / max(1, data.num_tokens)
    return (
        f"{plan.config.data.name}: {format_count(data.num_rows, 'row')} of up to {longest}, "
        f"{data.num_tokens:,} tokens ({share:.0%} trained), {format_count(data.num_eval_rows, 'held-out row')}"
    )


def _eval_sets(plan: LaunchPlan) -> str:
    """Return the names of the evaluation sets with their numbers of evaluated rows."""
    described = []
    for one in plan.config.eval.all_sets:
        data = plan.eval_sets.get(one.name)
        count = None if data is None else min(one.max_rows or data.num_rows, data.num_rows)
        described.append(f"{one.name}: {'not built yet' if count is None else format_count(count, 'row')}")
    return "; ".join(described)


def _tokens(plan: LaunchPlan) -> str:
    batch = plan.batch
    return f"about {batch.tokens_per_step:,}" if batch.tokens_per_step else f"up to {batch.max_tokens_per_step:,}"


def _steps(plan: LaunchPlan) -> str:
    config, batch = plan.config, plan.batch
    steps = f"{batch.max_steps:,}" if batch.max_steps is not None else "known when the data is built"
    epochs = f" ({batch.epochs:g} {'epoch' if batch.epochs == 1 else 'epochs'})" if batch.epochs is not None else ""
    evaluation = f"every {config.eval.every} and at the end" if config.eval.every else "at the end"
    save_every = config.checkpoint.save_every
    saves = f"every {save_every} and at the end" if save_every else "at the end"
    return f"{steps}{epochs}; evaluation {evaluation}; checkpoint {saves}"


def _tracking(plan: LaunchPlan) -> str:
    tracking = plan.config.tracking
    if tracking.kind == "none" or tracking.mode == "disabled":
        return "metrics.jsonl only"
    project = f"{tracking.entity}/{tracking.project}" if tracking.entity else tracking.project
    return f"W&B project {project}, mode {tracking.mode}, id {plan.wandb_id}"


def started_lines(run_dir: str | Path, started: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines about a started run: its directory, and how to follow and stop it."""
    name = short(run_dir)
    rows = [*started, ("directory", name)]
    rows += [
        ("follow it", launcher_command("logs", name, "-f")),
        ("its state", launcher_command("status", name)),
        ("stop it", launcher_command("cancel", name)),
    ]
    return ["", *(f"{label:<11}{short(value) if value.startswith('/') else value}" for label, value in rows)]


def sweep_lines(started: Sequence[tuple[LaunchPlan, Sequence[tuple[str, str]]]]) -> list[str]:
    """Return a line for each run of a sweep: name, job, and the overrides in which it differs."""
    shared = set.intersection(*(set(plan.provenance.overrides) for plan, _ in started))
    rows = []
    for plan, facts in started:
        own = [override for override in plan.provenance.overrides if override not in shared]
        rows.append((plan.run_name, dict(facts).get("job", "-"), " ".join(own)))
    return ["", *table(("run", "job", "settings"), rows)]
