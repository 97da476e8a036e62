"""States that DeepSpeed keeps on NVMe, brought into main memory piece by piece (deepspeed/runtime/swap_tensor/).

A sub-group of the optimizer lies on NVMe where it has at least 1 MiB of fp32 weights on this rank, and a partition of the weights
that the engine computes with where it alone has that much. Whatever is smaller stays in memory, as without NVMe.

One thread at a time: DeepSpeed's swappers know of one user, which is training, or a save for which training waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from torch.nn import Parameter


def may_hold_states(zero: Any) -> bool:
    """True where states may lie on NVMe; then they cannot be read while training computes."""
    return zero.swap_optimizer or zero.params_in_nvme_and_cpu


def forget_states(zero: Any) -> None:
    """Leave only the fp32 weights of each sub-group on NVMe; states that are made after this are written there behind them."""
    if zero.swap_optimizer:
        zero.optimizer_swapper.purge_state()


@contextmanager
def load_sub_group(zero: Any, group: int, *, changed: bool = False) -> Iterator[None]:
    """Have the fp32 weights and optimizer states of a sub-group in memory; with `changed` they are written back at the end.

    Sub-groups that are changed go in ascending order: DeepSpeed writes the last of them, and what is left of those before,
    to the end. Gradients of the last step come along and are dropped; at an optimizer boundary nothing needs them.
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


@contextmanager
def load_partition(parameter: Parameter) -> Iterator[None]:
    """Have this rank's partition of a weight in memory."""
    swapper, part = parameter.nvme_swapper, parameter.ds_tensor
    if part.status == PartitionedParamStatus.INFLIGHT:
        # Fetched ahead for the next forward pass, which finds it.
        swapper.synchronize_reads()
    if part.status == PartitionedParamStatus.AVAILABLE:
        yield
        return
    swapper.swap_in([parameter], async_op=False)
    try:
        yield
    finally:
        swapper.remove_partition_and_release_buffers([parameter])
