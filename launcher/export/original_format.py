"""The names and shapes under which weight files store a model's parameters and buffers, as transformers' `save_pretrained` does.

transformers fuses the experts of a layer into a few parameters and renames others when it loads a model. Other programs, such as
inference servers, know only the names of the original files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from launcher.checkpoint.initial_weights import can_fuse

Shape = tuple[int, ...]
# More than the blocks of any parameter.
_STRIDE = 2**32


def find_stored_tensors(model: Any, parameters: Mapping[str, Shape]) -> dict[str, list[tuple[str, Shape]]] | None:
    """Return the stored tensors (name, shape) of each parameter or buffer that files store differently, in the order of elements.

    `model` is a transformers model, also on the meta device. The result is None if transformers cannot undo its conversions, or
    if the elements of a stored tensor are not consecutive in the parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    if all(isinstance(transform, PrefixChange) for transform in transforms):
        return {}
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    try:
        reversed_converters = [(converter, converter.reverse_transform()) for converter in converters]
    except NotImplementedError:
        return None
    # Small stand-ins of the parameters; their elements say which block of which parameter they stand for.
    stand_ins: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(parameters.items()):
        converter = next((one for one, inverse in reversed_converters if inverse.rename_source_key(name)[1] is not None), None)
        reduced: Shape = (1,)
        if converter is not None:
            num_sources = len(converter.source_patterns)
            if not can_fuse(converter) or len(shape) < 2 or shape[1] % num_sources:
                return None
            # An expert's tensors are stacked along dimension 0 and concatenated along dimension 1.
            reduced = (shape[0], num_sources, *(1 for _ in shape[2:]))
        stand_ins[name] = torch.arange(math.prod(reduced)).view(reduced) + number * _STRIDE
    names = list(parameters)
    parts: dict[str, list[tuple[int, str, Shape]]] = {name: [] for name in names}
    for stored_name, stand_in in revert_weight_conversion(model, stand_ins).items():
        number, block = divmod(int(stand_in.flatten()[0]), _STRIDE)
        name, whole = names[number], stand_ins[names[number]]
        if not torch.equal(stand_in.flatten(), whole.flatten()[block : block + stand_in.numel()]):
            return None
        shape = parameters[name]
        if whole.dim() > 1:
            shape = (stand_in.shape[0] * (shape[1] // whole.shape[1]), *shape[2:])
        parts[name].append((block, stored_name, shape))
    stored = {name: [(stored_name, shape) for _, stored_name, shape in sorted(tensors)] for name, tensors in parts.items()}
    if any(sum(math.prod(shape) for _, shape in stored[name]) != math.prod(parameters[name]) for name in names):
        return None
    return {name: tensors for name, tensors in stored.items() if tensors != [(name, parameters[name])]}
