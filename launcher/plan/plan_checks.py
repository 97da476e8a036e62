"""Checks for settings that are valid on their own but wrong for this model, data or cluster: refusals and warnings. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.config.schema import RunConfig
from launcher.config.sections.evaluation import HELD_OUT
from launcher.errors import Problem, did_you_mean
from launcher.plan.architecture import context_tokens
from launcher.plan.checkpoints import warn_of_short_saves
from launcher.plan.gpu_types import GPUS, lookup
from launcher.plan.launch_plan import DataFacts, DeviceFacts, LaunchPlan, ModelFacts, Topology
from launcher.plan.objectives import OBJECTIVES
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.quantities import format_count
from launcher.plan.sizing.memory import num_hpz_ranks
from launcher.plan.steps import single_step_warning

# Multiples of the usual learning rate that cause a warning; random weights take larger rates than trained weights.
_HIGH_LR, _HIGH_LR_RANDOM = 10.0, 1000.0
_MAX_LR = 1.0


def find_topology_refusals(config: RunConfig, device: DeviceFacts, topology: Topology) -> Iterator[Problem]:
    """Yield problems of settings that these nodes and ranks cannot satisfy; `device` is that of one of the nodes."""
    gpu_type = config.cluster.gpu_type
    if gpu_type is not None and lookup(gpu_type) is None:
        guess, choices = did_you_mean(gpu_type, list(GPUS)), ", ".join(GPUS)
        yield Problem(
            f"cluster.gpu_type={gpu_type} is not in the table of GPU types",
            where="cluster.gpu_type",
            value=gpu_type,
            remedy=f"{guess} remove it to plan for this machine, or choose one of {choices}".strip(),
        )
    if gpu_type is not None and config.cluster.ranks_per_node is None and device.kind != "cuda":
        yield Problem(
            "this machine has no GPU, so the number of GPUs per node is unknown",
            where="cluster.gpu_type",
            value=gpu_type,
            remedy="set cluster.ranks_per_node to the GPUs of one node",
        )
    fewest_nodes = config.cluster.fewest_nodes
    if fewest_nodes is not None and fewest_nodes > topology.nodes:
        yield Problem(
            f"cluster.min_nodes={fewest_nodes} is more than the {topology.nodes} nodes of the run",
            where="cluster.min_nodes",
            value=str(fewest_nodes),
            remedy="lower it, or raise cluster.nodes",
        )
    if topology.device == "cpu" and config.model.attention.startswith("flash_attention"):
        yield Problem(
            f"model.attention={config.model.attention} needs GPUs, and this run computes on CPUs",
            where="model.attention",
            value=config.model.attention,
            remedy="set model.attention=auto",
        )
    yield from check_hpz(config, topology)


def check_hpz(config: RunConfig, topology: Topology) -> Iterator[Problem]:
    """Yield a problem if the ranks that share a second copy of the weights do not divide all ranks."""
    hpz = num_hpz_ranks(config.deepspeed, topology.ranks_per_node)
    if topology.world_size % hpz:
        yield Problem(
            f"deepspeed.hpz_partition_size={hpz} does not divide the {topology.world_size} ranks",
            where="deepspeed.hpz_partition_size",
            value=str(hpz),
            remedy=f"set it to the ranks of one node ({topology.ranks_per_node}), to node, or to 1",
        )


def find_refusals(config: RunConfig, model: ModelFacts, data: DataFacts | None) -> Iterator[Problem]:
    """Yield problems of settings that would make the run fail or destroy its model; `data` is None before it is built."""
    lr, name, offload = config.optim.lr, config.optim.name, config.deepspeed.offload_optimizer
    optimizer = OPTIMIZERS.get(name)
    usual = None if optimizer is None else optimizer.usual_lr
    if optimizer is None:
        yield Problem("unknown optimizer", where="optim.name", value=name, remedy=f"choose one of: {', '.join(OPTIMIZERS)}")
    elif offload != "none" and not optimizer.can_offload:
        remedy = "set deepspeed.offload_optimizer=none, or use optim=adamw"
        yield Problem(f"the states of {name} cannot be offloaded", "deepspeed.offload_optimizer", offload, remedy)
    objective = OBJECTIVES.get(config.objective.name)
    if objective is None:
        remedy = f"choose one of: {', '.join(OBJECTIVES)}"
        yield Problem("unknown objective", "objective.name", config.objective.name, remedy)
    elif data is not None and (missing := [name for name in objective.columns if name not in data.columns]):
        message = f"this objective needs the column {missing[0]}, and no row has a value of it"
        remedy = f"add {missing[0]} to the rows, and set the source's format to one that reads it; or set objective=sft"
        yield Problem(message, "objective.name", config.objective.name, remedy)
    if usual is not None and lr > _MAX_LR and config.model.init == "pretrained":
        yield Problem(
            f"optim.lr={lr:g} would destroy the weights in the first step",
            where="optim.lr",
            value=f"{lr:g}",
            remedy=f"fine-tuning with {config.optim.name} usually takes {_write_range(usual)}: set optim.lr=1e-5",
        )
    if config.eval.stop_after and not config.eval.intervals[config.checkpoint.best_set]:
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
        yield Problem(
            f"eval.answers_every={every} is not a multiple of checkpoint.save_every={save_every}: answers come from checkpoints",
            where="eval.answers_every",
            value=str(every),
            remedy=f"set checkpoint.save_every={every}",
        )
    if every and data is not None and not data.num_eval_rows and not config.eval.sets:
        yield Problem(
            "eval.answers_every needs prompts to answer, and there are no held-out rows and no eval.sets",
            where="eval.answers_every",
            value=str(every),
            remedy="hold out documents with prompts (data.eval_fraction=0.05), name a file of them in eval.sets, or remove it",
        )


def find_warnings(plan: LaunchPlan) -> Iterator[str]:
    """Yield a warning for each probable mistake, with a suitable value."""
    config, data, data_ranks = plan.config, plan.data, plan.topology.data_ranks
    lr, usual = config.optim.lr, OPTIMIZERS[config.optim.name].usual_lr
    allowed = _HIGH_LR if config.model.init == "pretrained" else _HIGH_LR_RANDOM
    if usual is not None and lr > allowed * usual[1]:
        yield f"optim.lr={lr:g} is high: fine-tuning with {config.optim.name} usually takes {_write_range(usual)}"
    settings = {"eval.stop_after": config.eval.stop_after, "checkpoint.keep_best": config.checkpoint.keep_best}
    uses_best = [name for name, value in settings.items() if value]
    if uses_best and config.checkpoint.best_set == HELD_OUT and data is not None and not data.num_eval_rows:
        yield f"{' and '.join(uses_best)} need held-out rows, and there are none: set data.eval_fraction=0.05"
    elif config.checkpoint.keep_best and not config.eval.intervals[config.checkpoint.best_set]:
        yield "checkpoint.keep_best needs evaluations while training: set eval.every to a number of steps"
    batch = config.train.global_batch_size
    if data is not None and (few := single_step_warning(config.train, data.num_rows, data_ranks)):
        yield few
    elif data is not None and data.num_rows < batch:
        largest = data.num_rows // data_ranks * data_ranks
        fitting = (
            f"set train.global_batch_size={largest}"
            if largest
            else f"lower it, and use at most {format_count(data.num_rows, 'rank')}"
        )
        rows = format_count(data.num_rows, "row")
        yield f"a batch of {format_count(batch, 'row')} is more than the {rows} of the data, so each step repeats rows: {fitting}"
    yield from warn_of_short_saves(plan)


def _write_range(usual: tuple[float, float]) -> str:
    return f"{usual[0]:g} to {usual[1]:g}"
