"""Fills a ZeRO-3 partitioned model from safetensors files: each rank reads only the bytes of its own partitions.

In transformers, rank 0 reads all weights and sends them to the other ranks, so a multi-node run starts at the speed of one rank.
The files of a mixture of experts usually store each expert's weights as separate tensors, which transformers fuses into a few
parameters per layer. The elements of such a parameter are those of the stored tensors in a fixed order, so a rank reads its own
range of it from the tensors that cover the range.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """A tensor in a safetensors file: its name, type and shape as in the header, and the offset of its first byte in the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class ParameterSource:
    """Where the files store a parameter of the model: its elements are those of `parts`, one part after the other."""

    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class ParameterSources:
    """Where the files store the parameters of a model, by the model's names, and which parts of fused parameters they lack."""

    by_name: Mapping[str, ParameterSource]
    missing: tuple[str, ...] = ()


def can_fuse(converter: Any) -> bool:
    """Return whether transformers' converter yields one parameter whose elements are those of its inputs, in a known order."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    merges, concatenates = operations[:1] == [(MergeModulelist, 0)], operations[1:] == [(Concatenate, 1)]
    is_known = merges and (concatenates or (len(operations) == 1 and len(converter.source_patterns) == 1))
    return type(converter) is WeightConverter and len(converter.target_patterns) == 1 and is_known


def find_sources(model: Any, stored: Mapping[str, StoredTensor]) -> ParameterSources | None:
    """Return where the files store the parameters of a transformers model; None if transformers converts them in another way.

    Names and order are those of `_apply_weight_conversions_to_state_dict` in transformers.integrations.deepspeed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    if len(renamings) + len(converters) < len(transforms):
        return None
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, ParameterSource] = {}
    fused: dict[str, dict[str, list[StoredTensor]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        tensor = stored[name]
        target, pattern = rename_source_key(name, renamings, converters, base_model_prefix=prefix, meta_state_dict=known)
        if target not in known:
            continue
        if target in sources or (pattern is None and target in fused):
            return None
        if pattern is None:
            sources[target] = ParameterSource(tensor.shape, (tensor,))
        else:
            fused.setdefault(target, {}).setdefault(pattern, []).append(tensor)
    shapes = {name: _full_shape(parameter) for name, parameter in model.named_parameters()}
    missing: list[str] = []
    for name, tensors in fused.items():
        converter = by_pattern[next(iter(tensors))]
        if not can_fuse(converter) or name not in shapes:
            return None
        if len(tensors) == len(converter.source_patterns):
            missing += (part for parts in tensors.values() for part in _list_missing_parts(parts, shapes[name][0]))
        if source := _fuse([tensors.get(pattern, []) for pattern in converter.source_patterns]):
            sources[name] = source
    return ParameterSources(sources, tuple(missing))


def _fuse(patterns: Sequence[Sequence[StoredTensor]]) -> ParameterSource | None:
    """Stack the tensors of each pattern, and concatenate the stacks along dimension 1; None if their shapes do not allow it."""
    num_experts, first = len(patterns[0]), next(iter(patterns[0]), None)
    if first is None or not first.shape or any(len(tensors) != num_experts for tensors in patterns):
        return None
    shapes = [tensors[0].shape for tensors in patterns]
    if any(tensor.shape != shape for tensors, shape in zip(patterns, shapes, strict=True) for tensor in tensors):
        return None
    if any(shape[1:] != first.shape[1:] or not shape for shape in shapes):
        return None
    parts = tuple(tensor for expert in zip(*patterns, strict=True) for tensor in expert)
    return ParameterSource((num_experts, sum(shape[0] for shape in shapes), *first.shape[1:]), parts)


def _list_missing_parts(parts: Iterable[StoredTensor], number: int) -> Iterable[str]:
    """Yield the names of the parts that are missing among `number` parts, which are numbered from 0 in their names."""
    names = {part.name for part in parts}
    if len(names) >= number:
        return
    for before, after in {(match[1], match[3]) for name in names if (match := re.fullmatch(r"(.*\.)(\d+)(\..*)", name))}:
        yield from (name for index in range(number) if (name := f"{before}{index}{after}") not in names)


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that weight files contain, such as the corrections of a router's scores. They are not partitioned."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def can_fill_buffers(model: nn.Module, sources: Mapping[str, ParameterSource]) -> bool:
    """Return whether the files store every buffer that belongs in weight files, with the same shape."""
    return all(_is_readable(sources.get(name), tuple(buffer.shape)) for name, buffer in stored_buffers(model).items())


def can_fill(model: nn.Module, sources: Mapping[str, ParameterSource]) -> bool:
    """Return whether every parameter is partitioned in memory, and stored in the files with the same shape."""
    for name, parameter in model.named_parameters():
        own = getattr(parameter, "ds_tensor", None)
        if own is None or not _is_readable(sources.get(name), _full_shape(parameter)):
            return False
        # Weights on NVMe are in files.
        start, stop = own_range(parameter)
        if own.numel() < stop - start:
            return False
    return True


def _is_readable(source: ParameterSource | None, shape: tuple[int, ...]) -> bool:
    return source is not None and source.shape == shape and all(part.dtype in _DTYPES for part in source.parts)


@torch.no_grad()
def fill_buffers(model: nn.Module, sources: Mapping[str, ParameterSource]) -> None:
    """Read the buffers that weight files contain; each rank reads all of them."""
    for name, buffer in stored_buffers(model).items():
        values = torch.empty(buffer.numel(), dtype=buffer.dtype)
        _read(sources[name], 0, buffer.numel(), values)
        buffer.copy_(values.view(buffer.shape))


@torch.no_grad()
def fill(model: nn.Module, sources: Mapping[str, ParameterSource], on_fill: Callable[[int], None]) -> None:
    """Read this rank's partition of every parameter; no communication.

    `on_fill` is called with the bytes of each parameter as the model holds it, over all ranks.
    """
    first_parts = {name: source.parts[0] for name, source in sources.items()}
    by_place = sorted(model.named_parameters(), key=lambda one: (first_parts[one[0]].path, first_parts[one[0]].offset))
    for name, parameter in by_place:
        _read(sources[name], *own_range(parameter), parameter.ds_tensor.view(-1))
        # hpZ's second copy is of the weights before; the next pass makes another one, as after each step.
        parameter.ds_secondary_tensor = None
        on_fill(parameter.ds_numel * parameter.ds_tensor.element_size())


def _read(source: ParameterSource, start: int, stop: int, target: Tensor) -> None:
    """Copy the elements [start, stop) of a parameter to the beginning of `target`."""
    begin = 0
    for part in source.parts:
        end = begin + math.prod(part.shape)
        first, last = max(start, begin), min(stop, end)
        if first < last:
            _read_part(part, first - begin, last - begin, target[first - start : last - start])
        begin = end


def _read_part(stored: StoredTensor, start: int, stop: int, target: Tensor) -> None:
    """Copy the elements [start, stop) of a tensor in a file to `target`."""
    dtype = _DTYPES[stored.dtype]
    step = _BLOCK_BYTES // dtype.itemsize
    with open(stored.path, "rb", buffering=0) as file:
        for first in range(start, stop, step):
            count = min(step, stop - first)
            block = bytearray(count * dtype.itemsize)
            view, offset = memoryview(block), stored.offset + first * dtype.itemsize
            while view:
                num_bytes = os.preadv(file.fileno(), [view], offset)
                if not num_bytes:
                    message = f"a weight file is incomplete: it ends within the tensor {stored.name}"
                    raise ConfigError(message, where="model.path", value=str(stored.path), remedy="download this file again")
                view, offset = view[num_bytes:], offset + num_bytes
            target[first - start : first - start + count].copy_(torch.frombuffer(block, dtype=dtype))


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the whole shape of a parameter that may be partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def own_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Return the range [start, stop) of a partitioned parameter's elements that are on this rank, without padding."""
    return partition(parameter.ds_numel, dist.get_world_size(), dist.get_rank())
