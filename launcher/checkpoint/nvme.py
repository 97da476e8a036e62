"""Bring states that DeepSpeed offloads to NVMe into host memory, piece by piece (deepspeed/runtime/swap_tensor/).

An optimizer sub-group is on NVMe if it has at least 1 MiB of fp32 weights on this rank; so is a partition of the compute weights
of that size. Anything smaller stays in memory.

Use one thread at a time: DeepSpeed's swappers support a single user, either training or a save that training waits for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from torch.nn import Parameter


def may_hold_states(zero: Any) -> bool:
    """Return whether states may be on NVMe; if so, they cannot be read while training computes."""
    return zero.swap_optimizer or zero.params_in_nvme_and_cpu


def purge_states(zero: Any) -> None:
    """Keep only the fp32 weights of each sub-group on NVMe; states created after this are appended there."""
    if zero.swap_optimizer:
        zero.optimizer_swapper.purge_state()


@contextmanager
def load_sub_group(zero: Any, group: int, *, changed: bool = False) -> Iterator[None]:
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


@contextmanager
def load_partition(parameter: Parameter) -> Iterator[None]:
    """Hold this rank's partition of a compute weight in memory."""
    swapper, part = parameter.nvme_swapper, parameter.ds_tensor
    if part.status == PartitionedParamStatus.INFLIGHT:
        # It is prefetched for the next forward pass.
        swapper.synchronize_reads()
    if part.status == PartitionedParamStatus.AVAILABLE:
        yield
        return
    swapper.swap_in([parameter], async_op=False)
    try:
        yield
    finally:
        swapper.remove_partition_and_release_buffers([parameter])
