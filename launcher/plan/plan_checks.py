"""Checks for settings that are valid on their own but wrong for this model, data or cluster: refusals and warnings. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.config.schema import RunConfig
from launcher.config.sections.evaluation import HELD_OUT
from launcher.errors import Problem
from launcher.plan.checkpoints import warn_of_short_saves
from launcher.plan.launch_plan import DataFacts, LaunchPlan, ModelFacts
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.quantities import format_count
from launcher.plan.steps import single_step_warning

# Multiples of the usual learning rate that cause a warning; random weights take larger rates than trained weights.
_HIGH_LR, _HIGH_LR_RANDOM = 10.0, 1000.0
_MAX_LR = 1.0
# A RoPE factor above this is no scaling of positions.
_MAX_FACTOR = 1e6


def find_refusals(config: RunConfig, model: ModelFacts, data: DataFacts | None) -> Iterator[Problem]:
    """Yield problems of settings that would make the run fail or destroy its model; `data` is None before it is built."""
    lr, usual = config.optim.lr, _find_usual_lr(config)
    name, offload = config.optim.name, config.deepspeed.offload_optimizer
    if name not in OPTIMIZERS:
        yield Problem("unknown optimizer", where="optim.name", value=name, remedy=f"choose one of: {', '.join(OPTIMIZERS)}")
    elif offload != "none" and not OPTIMIZERS[name].can_offload:
        remedy = "set deepspeed.offload_optimizer=none, or use optim=adamw"
        yield Problem(f"the states of {name} cannot be offloaded", "deepspeed.offload_optimizer", offload, remedy)
    if usual is not None and lr > _MAX_LR and config.model.init == "pretrained":
        yield Problem(
            f"optim.lr={lr:g} would destroy the weights in the first step",
            where="optim.lr",
            value=f"{lr:g}",
            remedy=f"fine-tuning with {config.optim.name} usually takes {_write_range(usual)}: set optim.lr=1e-5",
        )
    if config.eval.stop_after and not _find_best_set_interval(config):
        yield Problem(
            f"eval.stop_after needs evaluations during training; {config.checkpoint.best_set} is evaluated before and after it",
            where="eval.stop_after",
            value=str(config.eval.stop_after),
            remedy="set eval.every to a number of steps",
        )
    length, context = config.data.max_length, context_tokens(model.config)
    if context is not None and length > context:
        yield Problem(
            f"data.max_length={length} is more than the {context} positions of this model",
            where="data.max_length",
            value=str(length),
            remedy=f"set data.max_length to {context} or less, or scale RoPE in the model's config.json (rope_parameters)",
        )
    every, save_every = config.eval.answers_every, config.checkpoint.save_every
    if every and (not save_every or every % save_every):
        fitting = math.ceil(every / save_every) * save_every if save_every else 0
        yield Problem(
            f"eval.answers_every={every} is not a multiple of checkpoint.save_every={save_every}: answers come from checkpoints",
            where="eval.answers_every",
            value=str(every),
            remedy=f"set checkpoint.save_every={every}" + (f", or eval.answers_every={fitting}" if fitting else ""),
        )
    if every and data is not None and not data.num_eval_rows and not config.eval.sets:
        yield Problem(
            "eval.answers_every needs prompts to answer, and there are no held-out rows and no eval.sets",
            where="eval.answers_every",
            value=str(every),
            remedy="hold out documents with prompts (data.eval_fraction=0.05), name a file of them in eval.sets, or remove it",
        )


def _find_best_set_interval(config: RunConfig) -> int:
    """Return the steps between evaluations of the set checkpoint.best_set; 0 if it is not evaluated during training."""
    intervals = {one.name: one.every for one in config.eval.all_sets}
    every = intervals.get(config.checkpoint.best_set)
    return config.eval.every if every is None else every


def find_warnings(plan: LaunchPlan) -> Iterator[str]:
    """Yield a warning for each probable mistake, with a suitable value."""
    config, data, world_size = plan.config, plan.data, plan.topology.world_size
    lr, usual = config.optim.lr, _find_usual_lr(config)
    allowed = _HIGH_LR if config.model.init == "pretrained" else _HIGH_LR_RANDOM
    if usual is not None and lr > allowed * usual[1]:
        yield f"optim.lr={lr:g} is high: fine-tuning with {config.optim.name} usually takes {_write_range(usual)}"
    settings = {"eval.stop_after": config.eval.stop_after, "checkpoint.keep_best": config.checkpoint.keep_best}
    uses_best = [name for name, value in settings.items() if value]
    if uses_best and config.checkpoint.best_set == HELD_OUT and data is not None and not data.num_eval_rows:
        yield f"{' and '.join(uses_best)} need held-out rows, and there are none: set data.eval_fraction=0.05"
    elif config.checkpoint.keep_best and not _find_best_set_interval(config):
        yield "checkpoint.keep_best needs evaluations while training: set eval.every to a number of steps"
    batch = config.train.global_batch_size
    if data is not None and (few := single_step_warning(config.train, data.num_rows, world_size)):
        yield few
    elif data is not None and data.num_rows < batch:
        largest = data.num_rows // world_size * world_size
        fitting = (
            f"set train.global_batch_size={largest}"
            if largest
            else f"lower it, and use at most {format_count(data.num_rows, 'rank')}"
        )
        rows = format_count(data.num_rows, "row")
        yield f"a batch of {format_count(batch, 'row')} is more than the {rows} of the data, so each step repeats rows: {fitting}"
    yield from warn_of_short_saves(plan)


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """Return the tokens of the longest document that the model's positions cover, with RoPE scaling; None if unknown."""
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(positions, int) or isinstance(positions, bool) or positions <= 0:
        return None
    # The mappings with RoPE settings: one, or one for each kind of layer.
    sections = [section for key in ("rope_parameters", "rope_scaling") if isinstance(section := config.get(key), dict)]
    sections += [inner for section in sections for inner in section.values() if isinstance(inner, dict)]
    scaled = [
        int(factor * (rope.get("original_max_position_embeddings") or positions))
        for rope in sections
        if isinstance(factor := rope.get("factor"), int | float) and factor < _MAX_FACTOR
    ]
    return max(positions, *scaled) if scaled else positions


def _find_usual_lr(config: RunConfig) -> tuple[float, float] | None:
    optimizer = OPTIMIZERS.get(config.optim.name)
    return None if optimizer is None else optimizer.usual_lr


def _write_range(usual: tuple[float, float]) -> str:
    return f"{usual[0]:g} to {usual[1]:g}"
