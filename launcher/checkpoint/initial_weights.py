"""Fills a ZeRO-3 partitioned model from safetensors files: each rank reads only the bytes of its own partitions.

In transformers, rank 0 reads all weights and sends them to the other ranks, so a multi-node run starts at the speed of one rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.checkpoint.store import partition
from launcher.errors import ConfigError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Memory that a rank uses in addition to its partitions.
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its type and shape as in the header, and the offset of its first byte in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def can_fill(model: nn.Module, stored: Mapping[str, StoredTensor]) -> bool:
    """Return whether every parameter is partitioned in memory, and stored in the files with the same name and shape."""
    for name, parameter in model.named_parameters():
        tensor, own = stored.get(name), getattr(parameter, "ds_tensor", None)
        if own is None or tensor is None or tensor.dtype not in _DTYPES or tensor.shape != tuple(parameter.ds_shape):
            return False
        # Weights on NVMe are in files.
        if own.numel() < _own_elements(parameter):
            return False
    return True


@torch.no_grad()
def fill(model: nn.Module, stored: Mapping[str, StoredTensor], on_fill: Callable[[int], None]) -> int:
    """Read this rank's partition of every parameter and return the bytes that were read; no communication.

    `on_fill` is called with the bytes of each parameter as the model holds it, over all ranks.

    Raises:
        ConfigError: if a file is shorter than its header says.
    """
    total = 0
    by_place = sorted(model.named_parameters(), key=lambda one: (stored[one[0]].path, stored[one[0]].offset))
    for name, parameter in by_place:
        total += _read(stored[name], *_own_range(parameter), parameter.ds_tensor.view(-1))
        # hpZ's second copy is of the weights before; the next pass makes another one, as after each step.
        parameter.ds_secondary_tensor = None
        on_fill(parameter.ds_numel * parameter.ds_tensor.element_size())
    return total


def _read(stored: StoredTensor, start: int, stop: int, target: Tensor) -> int:
    """Copy the elements [start, stop) of a tensor in a file to the beginning of `target`; return the bytes that were read."""
    dtype = _DTYPES[stored.dtype]
    step = _BLOCK_BYTES // dtype.itemsize
    with open(stored.path, "rb", buffering=0) as file:
        for first in range(start, stop, step):
            count = min(step, stop - first)
            block = bytearray(count * dtype.itemsize)
            _read_fully(file.fileno(), block, stored.offset + first * dtype.itemsize, stored.path)
            target[first - start : first - start + count].copy_(torch.frombuffer(block, dtype=dtype))
    return (stop - start) * dtype.itemsize


def _read_fully(descriptor: int, block: bytearray, offset: int, path: Path) -> None:
    view, done = memoryview(block), 0
    while done < len(block):
        num_bytes = os.preadv(descriptor, [view[done:]], offset + done)
        if not num_bytes:
            raise ConfigError(
                "a weight file is incomplete", where="model.path", value=str(path), remedy="download this file again"
            )
        done += num_bytes


def _own_range(parameter: nn.Parameter) -> tuple[int, int]:
    return partition(parameter.ds_numel, dist.get_world_size(), dist.get_rank())


def _own_elements(parameter: nn.Parameter) -> int:
    start, stop = _own_range(parameter)
    return stop - start
