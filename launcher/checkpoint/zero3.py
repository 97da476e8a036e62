"""What a checkpoint needs of a DeepSpeed ZeRO-3 engine: its partitions, moments, step and loss scale, out and in.

All knowledge of DeepSpeed's inside is here (deepspeed/runtime/zero/stage3.py, ops/adam/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from torch.nn import Parameter

from launcher.checkpoint.store import partition
from launcher.errors import CheckpointError

FP32 = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")

_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")

# (parameter name, fp32 or a moment, elements of the whole parameter, first element, CPU tensor to fill)
Fill = Callable[[str, str, int, int, torch.Tensor], None]


def require_served(engine: Any, named_parameters: Mapping[str, Parameter]) -> None:
    """CheckpointError where this engine's states cannot be read parameter by parameter, or the names do not cover it."""
    zero = engine.optimizer
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        raise CheckpointError("checkpoints are written for DeepSpeed ZeRO stage 3 only", value=type(zero).__name__)
    base = zero.optimizer
    if not isinstance(base, torch.optim.Adam | DeepSpeedCPUAdam | FusedAdam) or any(g.get("amsgrad") for g in base.param_groups):
        raise CheckpointError(
            "checkpoints hold the two moments of AdamW; this optimizer has another state",
            value=f"{type(base).__module__}.{type(base).__name__}",
            remedy="use optim=adamw without amsgrad",
        )
    if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
        raise CheckpointError(
            "states that are offloaded to NVMe cannot be checkpointed: DeepSpeed gives no view of them",
            where="deepspeed.offload_optimizer, deepspeed.offload_params",
            value="nvme",
            remedy="offload to cpu",
        )
    if zero.offload_optimizer and zero.partial_offload != 1.0:
        raise CheckpointError(
            "an optimizer that is offloaded in part keeps some moments where DeepSpeed gives no view of them",
            where="deepspeed.extra: zero_optimization.offload_optimizer.ratio",
            value=str(zero.partial_offload),
            remedy="set the ratio to 1.0",
        )
    if frozen := [name for name, p in named_parameters.items() if not p.requires_grad]:
        raise CheckpointError("frozen parameters cannot be checkpointed: ZeRO-3 has no fp32 weights of them", value=_some(frozen))
    if split := [n for n, p in named_parameters.items() if p.ds_zero_partition_world_size != dist.get_world_size()]:
        raise CheckpointError("parameters must be partitioned over all ranks", value=_some(split))
    if {id(p) for p in named_parameters.values()} != {id(p) for p in engine.module.parameters()}:
        raise CheckpointError("the named parameters are not exactly those of the engine's model")


def local_elements(parameter: Parameter) -> int:
    """Elements of a parameter on this rank, without padding."""
    start, stop = partition(parameter.ds_numel, dist.get_world_size(), dist.get_rank())
    return stop - start


def layout(engine: Any, named_parameters: Mapping[str, Parameter]) -> list[tuple[str, str, int]]:
    """(parameter name, fp32 or a moment, elements on this rank) in the order in which `local_states` gives them.

    There are moments only after the first optimizer step.
    """
    keys = (FP32, *MOMENTS) if optimizer_step(engine) else (FP32,)
    members = [member for group in _members(engine, named_parameters).values() for member in group]
    return [(name, key, local_elements(parameter)) for name, parameter, _ in members for key in keys]


def local_states(engine: Any, named_parameters: Mapping[str, Parameter]) -> Iterator[torch.Tensor]:
    """This rank's part of every state: flat, fp32, without padding, wherever DeepSpeed keeps it. No communication.

    Each is a view, valid until the next one is asked for and the optimizer steps.
    """
    zero = engine.optimizer
    keys = (FP32, *MOMENTS) if optimizer_step(engine) else (FP32,)
    for group, members in _members(engine, named_parameters).items():
        flat = zero.fp32_partitioned_groups_flat[group]
        for name, parameter, offset in members:
            for key in keys:
                state = flat if key == FP32 else zero.optimizer.state[flat][key]
                if state.dtype != torch.float32:
                    problem = "weights and optimizer moments must be kept in fp32"
                    raise CheckpointError(problem, where=name, value=f"{key} is {state.dtype}")
                yield state.detach().narrow(0, offset, local_elements(parameter))


def local_weights(named_parameters: Mapping[str, Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's part of the weights that the engine computes with: flat views, without padding, valid as `local_states`."""
    for name, parameter in named_parameters.items():
        yield name, parameter.ds_tensor.detach().narrow(0, 0, local_elements(parameter))


def _members(engine: Any, named_parameters: Mapping[str, Parameter]) -> dict[int, list[tuple[str, Parameter, int]]]:
    """The parameters of each of the optimizer's sub-groups: name, parameter, and where it begins in the flat state."""
    members: dict[int, list[tuple[str, Parameter, int]]] = {}
    for name, parameter in named_parameters.items():
        group, offset, _ = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        members.setdefault(group, []).append((name, parameter, offset))
    return members


def optimizer_step(engine: Any) -> int:
    """Optimizer steps that changed the weights (skipped ones do not count); the same for every parameter."""
    zero = engine.optimizer
    steps = {int(zero.optimizer.state.get(flat, {}).get("step", 0)) for flat in zero.fp32_partitioned_groups_flat}
    if len(steps) != 1:
        raise CheckpointError("parameters have been updated a different number of times", value=str(sorted(steps)))
    return steps.pop()


def fill(engine: Any, named_parameters: Mapping[str, Parameter], step: int, read: Fill) -> None:
    """Put this rank's part of every state into the engine. No communication; `publish` on all ranks has to follow."""
    zero = engine.optimizer
    zero.checkpoint_event_prologue()
    _make_optimizer_state(zero, step)
    for name, parameter in named_parameters.items():
        start, stop = partition(parameter.ds_numel, dist.get_world_size(), dist.get_rank())
        padded = torch.zeros(parameter.ds_tensor.ds_numel, dtype=torch.float32)
        part = padded[: stop - start]
        read(name, FP32, parameter.ds_numel, start, part)
        safe_set_local_fp32_param(parameter, padded)
        for key in MOMENTS if step else ():
            read(name, key, parameter.ds_numel, start, part)
            safe_set_local_optimizer_state(parameter, padded, key)


def publish(engine: Any) -> None:
    """Make the model compute with the fp32 weights that `fill` has set. Collective."""
    zero = engine.optimizer
    for sub_group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(sub_group)
    # Gathers the persistent parameters anew and drops the second copies that hpZ keeps.
    zero.checkpoint_event_epilogue()


def loss_scale_state(engine: Any) -> dict[str, float]:
    """The state of fp16's dynamic loss scale; empty where the scale is fixed."""
    scaler = engine.optimizer.loss_scaler
    return {key: getattr(scaler, key) for key in _LOSS_SCALE} if isinstance(scaler, DynamicLossScaler) else {}


def set_loss_scale_state(engine: Any, state: Mapping[str, float]) -> None:
    if isinstance(engine.optimizer.loss_scaler, DynamicLossScaler):
        for key, value in state.items():
            setattr(engine.optimizer.loss_scaler, key, value)


def counters(engine: Any) -> dict[str, int]:
    """DeepSpeed's own counts of steps and samples."""
    return {key: int(getattr(engine, key)) for key in _COUNTERS}


def set_counters(engine: Any, state: Mapping[str, int]) -> None:
    for key in _COUNTERS:
        setattr(engine, key, state[key])


def _make_optimizer_state(zero: Any, step: int) -> None:
    """Empty moments, and `step` in the form in which the optimizer's own first step would have made it."""
    base = zero.optimizer
    for sub_group, flat in enumerate(zero.fp32_partitioned_groups_flat):
        base.state.pop(flat, None)
        if step == 0:
            continue
        group = base.param_groups[zero.sub_group_to_group_id[sub_group]]
        count: int | torch.Tensor = step
        if isinstance(base, torch.optim.Adam):
            on_device = group["fused"] or group["capturable"]
            count = torch.tensor(float(step), dtype=torch.float32, device=flat.device if on_device else "cpu")
        moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
        base.state[flat] = {"step": count, **moments}
    if isinstance(base, DeepSpeedCPUAdam):
        _replay_bias_correction(base, step)


def _replay_bias_correction(adam: DeepSpeedCPUAdam, step: int) -> None:
    """Give the C++ optimizer the powers of beta that it would have after `step` steps.

    It multiplies them up step by step, and falls back on pow() when steps are not consecutive, which differs in the last
    bits (csrc/includes/cpu_adam.h, IncrementStep). One-element updates repeat the products.
    """
    group = adam.param_groups[0]
    settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
    scratch = [torch.zeros(1) for _ in range(4)]
    for past in range(1, step + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, past, *settings, *scratch)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
