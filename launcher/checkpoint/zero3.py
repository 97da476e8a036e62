"""Read and write the state of a DeepSpeed ZeRO-3 engine: partitions, optimizer states, step counts and loss scale.

Only this module depends on DeepSpeed's internals (deepspeed/runtime/zero/stage3.py, swap_tensor/, ops/adam/).

States that DeepSpeed offloads to NVMe come into host memory piece by piece: an optimizer sub-group is on NVMe if it has at least
1 MiB of fp32 weights on this rank; so is a partition of the compute weights of that size. Anything smaller stays in memory. Use
one thread at a time: DeepSpeed's swappers support a single user, either training or a save that training waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch.nn import Parameter

from launcher.checkpoint.initial_weights import own_range
from launcher.errors import CheckpointError
from launcher.plan.optimizers import Optimizer, find_by_class
from launcher.plan.quantities import list_first

FP32 = "fp32"

_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")

# (parameter name, fp32 or an optimizer state, elements of the whole parameter, first element, CPU tensor to fill)
ReadState = Callable[[str, str, int, int, torch.Tensor], None]


def require_supported_engine(engine: Any, named_parameters: Mapping[str, Parameter]) -> None:
    """Check that this engine's states can be read parameter by parameter."""
    zero = engine.optimizer
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        raise CheckpointError("checkpoints are written for DeepSpeed ZeRO stage 3 only", value=type(zero).__name__)
    find_optimizer(engine)
    if zero.offload_optimizer and zero.partial_offload != 1.0:
        raise CheckpointError(
            "DeepSpeed gives no access to some states of an optimizer that is only partly offloaded",
            where="deepspeed.extra: zero_optimization.offload_optimizer.ratio",
            value=str(zero.partial_offload),
            remedy="set the ratio to 1.0",
        )
    if frozen := [name for name, p in named_parameters.items() if not p.requires_grad]:
        raise CheckpointError(
            "frozen parameters cannot be checkpointed: ZeRO-3 has no fp32 weights of them", value=list_first(frozen, 3)
        )
    if split := [n for n, p in named_parameters.items() if p.ds_zero_partition_world_size != dist.get_world_size()]:
        raise CheckpointError("parameters must be partitioned over all ranks", value=list_first(split, 3))
    if {id(p) for p in named_parameters.values()} != {id(p) for p in engine.module.parameters()}:
        raise CheckpointError("the named parameters differ from those of the engine's model")


@contextmanager
def dropped_gradients(engine: Any) -> Iterator[None]:
    """Run one backward pass in the body without leaving gradients; no optimizer step may follow it.

    DeepSpeed's `zero_grad` only makes the next pass overwrite gradients, and a parameter may get none in that pass (an expert
    without tokens): the optimizer would then use this pass's gradient.
    """
    boundary = engine._is_gradient_accumulation_boundary
    # An offloaded optimizer gets gradients only at a boundary; gradients on NVMe could not be taken back.
    engine.set_gradient_accumulation_boundary(False)
    try:
        yield
    finally:
        engine._is_gradient_accumulation_boundary = boundary
    engine.optimizer.zero_grad()
    engine.optimizer.grad_partitions_flat_buffer.zero_()


def find_optimizer(engine: Any) -> Optimizer:
    """Find the row of OPTIMIZERS that describes this engine's optimizer."""
    kind = type(engine.optimizer.optimizer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    optimizer = find_by_class(name)
    if optimizer is None:
        raise CheckpointError(
            "checkpoints cannot hold the states of this optimizer: the launcher does not know them",
            value=name,
            remedy="list the class in OPTIMIZERS (launcher/plan/optimizers.py), with the names of its states",
        )
    return optimizer


def stored_keys(engine: Any, step: int) -> tuple[str, ...]:
    """Return the names of the tensors stored per parameter after `step` optimizer steps; before the first, only weights."""
    return (FP32, *find_optimizer(engine).states) if step else (FP32,)


def local_elements(parameter: Parameter) -> int:
    """Return the number of elements of a parameter on this rank, without padding."""
    start, stop = own_range(parameter)
    return stop - start


def state_layout(engine: Any, named_parameters: Mapping[str, Parameter]) -> list[tuple[str, str, int]]:
    """Return (parameter name, state name, number of elements on this rank) in the order of `local_states`.

    Optimizer states exist only after the first optimizer step.
    """
    keys, zero = stored_keys(engine, optimizer_step(engine)), engine.optimizer
    for flat in zero.fp32_partitioned_groups_flat:
        state = zero.optimizer.state.get(flat, {})
        actual = {key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}
        if actual != set(keys) - {FP32}:
            raise CheckpointError(
                "the optimizer's states differ from those that OPTIMIZERS (launcher/plan/optimizers.py) lists for it",
                value=f"it keeps {', '.join(sorted(actual))}",
                remedy=f"list them in its row, which lists {', '.join(keys[1:]) or 'none'}",
            )
    members = [member for group in _group_members(engine, named_parameters).values() for member in group]
    return [(name, key, local_elements(parameter)) for name, parameter, _ in members for key in keys]


def can_stage_in_background(engine: Any) -> bool:
    """Return whether a thread can read the states while the engine computes; it cannot if they are on NVMe."""
    zero = engine.optimizer
    return not (zero.swap_optimizer or zero.params_in_nvme_and_cpu)


def local_states(engine: Any, named_parameters: Mapping[str, Parameter]) -> Generator[torch.Tensor]:
    """Yield this rank's part of every state: flat, fp32, without padding, on any device. No communication.

    Each tensor is a view, valid until the next one is requested or the optimizer steps. A caller that stops early must close the
    generator: states from NVMe occupy memory while their views are in use.
    """
    zero = engine.optimizer
    keys = stored_keys(engine, optimizer_step(engine))
    for group, members in _group_members(engine, named_parameters).items():
        with _load_sub_group(zero, group):
            for name, parameter, offset in members:
                for key in keys:
                    state = _get_flat(zero, group, key)
                    if state.dtype != torch.float32:
                        problem = "weights and optimizer states must be kept in fp32"
                        raise CheckpointError(problem, where=name, value=f"{key} is {state.dtype}")
                    yield state.narrow(0, offset, local_elements(parameter))


def local_weights(named_parameters: Mapping[str, Parameter]) -> Generator[tuple[str, torch.Tensor]]:
    """Yield the name and this rank's part of every compute weight: flat views without padding, valid like `local_states`."""
    for name, parameter in named_parameters.items():
        swapper, part = parameter.nvme_swapper, parameter.ds_tensor
        if part.status == PartitionedParamStatus.INFLIGHT:
            # It is prefetched for the next forward pass.
            swapper.synchronize_reads()
        is_on_nvme = part.status != PartitionedParamStatus.AVAILABLE
        if is_on_nvme:
            swapper.swap_in([parameter], async_op=False)
        try:
            yield name, parameter.ds_tensor.detach().narrow(0, 0, local_elements(parameter))
        finally:
            if is_on_nvme:
                swapper.remove_partition_and_release_buffers([parameter])


@contextmanager
def _load_sub_group(zero: Any, group: int, *, changed: bool = False) -> Iterator[None]:
    """Hold the fp32 weights and optimizer states of a sub-group in memory; with `changed`, write them back at the end.

    Change sub-groups in ascending order: DeepSpeed flushes its pending writes with the last one. Gradients of the last step are
    also loaded, and dropped: at an optimizer boundary nothing needs them.
    """
    if not zero._swappable_optimizer_subgroup(group):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    except BaseException:
        zero._release_swap_buffers(group)
        raise
    if changed:
        zero._optimizer_states_and_gradient_swap_out(group)
    else:
        zero._release_swap_buffers(group)


def _get_flat(zero: Any, group: int, key: str) -> torch.Tensor:
    """Return a sub-group's flat fp32 weights or one of its optimizer states, with padding."""
    flat = zero.fp32_partitioned_groups_flat[group]
    state: torch.Tensor = flat if key == FP32 else zero.optimizer.state[flat][key]
    return state.detach()


def _group_members(engine: Any, named_parameters: Mapping[str, Parameter]) -> dict[int, list[tuple[str, Parameter, int]]]:
    """Return (name, parameter, offset in the flat state) by the optimizer's sub-groups, in ascending order."""
    members: dict[int, list[tuple[str, Parameter, int]]] = {}
    for name, parameter in named_parameters.items():
        group, offset, _ = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        members.setdefault(group, []).append((name, parameter, offset))
    return dict(sorted(members.items()))


def optimizer_step(engine: Any) -> int:
    """Return the number of optimizer steps applied to the weights, excluding skipped steps."""
    zero = engine.optimizer
    # For optimizers that do not count steps.
    applied = engine.global_steps - engine.skipped_steps
    states = (zero.optimizer.state.get(flat) for flat in zero.fp32_partitioned_groups_flat)
    steps = {int(state.get("step", applied)) if state else 0 for state in states}
    if len(steps) != 1:
        raise CheckpointError("parameters have been updated a different number of times", value=str(sorted(steps)))
    return steps.pop()


def load_states(engine: Any, named_parameters: Mapping[str, Parameter], step: int, read: ReadState) -> None:
    """Write this rank's part of every state into the engine. No communication; call `publish_weights` on all ranks after it.

    The compute weights are set too, while states from NVMe are in memory.
    """
    zero = engine.optimizer
    zero.checkpoint_event_prologue()
    if zero.swap_optimizer:
        # Keep only the fp32 weights of each sub-group on NVMe; states created after this are appended there.
        zero.optimizer_swapper.purge_state()
    for group, members in _group_members(engine, named_parameters).items():
        with _load_sub_group(zero, group, changed=True):
            _make_optimizer_state(engine, group, step)
            for name, parameter, offset in members:
                start, stop = own_range(parameter)
                padded = torch.zeros(parameter.ds_tensor.ds_numel, dtype=torch.float32)
                for key in stored_keys(engine, step):
                    read(name, key, parameter.ds_numel, start, padded[: stop - start])
                    _get_flat(zero, group, key).narrow(0, offset, padded.numel()).copy_(padded)
            zero._reassign_or_swap_out_partitioned_parameters(group)
    if isinstance(zero.optimizer, DeepSpeedCPUAdam):
        _replay_bias_correction(zero.optimizer, step)


def publish_weights(engine: Any) -> None:
    """Make the weights set by `load_states` visible to all ranks. Collective."""
    # Gathers the persistent parameters again and drops hpZ's secondary copies.
    engine.optimizer.checkpoint_event_epilogue()


def loss_scale_state(engine: Any) -> dict[str, float]:
    """Return the state of fp16's dynamic loss scale; empty if the scale is fixed."""
    scaler = engine.optimizer.loss_scaler
    return {key: getattr(scaler, key) for key in _LOSS_SCALE} if isinstance(scaler, DynamicLossScaler) else {}


def set_loss_scale_state(engine: Any, state: Mapping[str, float]) -> None:
    if isinstance(engine.optimizer.loss_scaler, DynamicLossScaler):
        for key, value in state.items():
            setattr(engine.optimizer.loss_scaler, key, value)


def read_counters(engine: Any) -> dict[str, int]:
    """Return DeepSpeed's own counts of steps and samples."""
    return {key: int(getattr(engine, key)) for key in _COUNTERS}


def set_counters(engine: Any, state: Mapping[str, int]) -> None:
    for key in _COUNTERS:
        setattr(engine, key, state[key])


def release_engine(engine: Any) -> None:
    """Free the memory of an engine; it cannot be used after this.

    DeepSpeed's hooks reference an engine for as long as the process lives, so its storages are emptied one by one.
    """
    zero = engine.optimizer
    containers = [
        vars(zero),
        zero.optimizer.state,
        [p.ds_tensor for p in engine.module.parameters()],
        # hpZ's second copy of the weights, which each pass after the last step makes again.
        [p.ds_secondary_tensor for p in engine.module.parameters()],
        list(engine.module.parameters()),
    ]
    for tensor in _iter_tensors(containers):
        storage = tensor.untyped_storage()
        if storage.resizable():
            storage.resize_(0)


def _iter_tensors(content: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers, and their gradients."""
    if isinstance(content, torch.Tensor):
        yield content
        if content.is_leaf and content.grad is not None:
            yield content.grad
    elif isinstance(content, Mapping):
        yield from _iter_tensors(list(content.values()))
    elif isinstance(content, list | tuple):
        for item in content:
            yield from _iter_tensors(item)


def _make_optimizer_state(engine: Any, sub_group: int, step: int) -> None:
    """Create zero-filled states, and `step` in the form that the optimizer's own first step creates."""
    zero, optimizer = engine.optimizer, find_optimizer(engine)
    base, flat = zero.optimizer, zero.fp32_partitioned_groups_flat[sub_group]
    base.state.pop(flat, None)
    if step == 0:
        return
    state: dict[str, Any] = {key: torch.zeros_like(flat.data) for key in optimizer.states}
    if optimizer.counts_steps:
        count: int | torch.Tensor = step
        if not isinstance(base, DeepSpeedCPUAdam):
            group = base.param_groups[zero.sub_group_to_group_id[sub_group]]
            # torch reads it there.
            device = flat.device if group.get("fused") or group.get("capturable") else "cpu"
            count = torch.tensor(float(step), dtype=torch.float32, device=device)
        state = {"step": count, **state}
    base.state[flat] = state


def _replay_bias_correction(adam: DeepSpeedCPUAdam, step: int) -> None:
    """Bring the C++ optimizer's powers of beta to their values after `step` steps.

    It multiplies them up step by step; for non-consecutive steps it falls back to pow(), which differs in the last bits
    (csrc/includes/cpu_adam.h, IncrementStep). Updates of one element repeat the products.
    """
    group = adam.param_groups[0]
    settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
    scratch = [torch.zeros(1) for _ in range(4)]
    for past in range(1, step + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, past, *settings, *scratch)
