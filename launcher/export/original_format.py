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
# More than the elements of any parameter.
_STRIDE = 2**48


def find_stored_tensors(model: Any, parameters: Mapping[str, Shape]) -> dict[str, list[tuple[str, Shape]]]:
    """Return the stored tensors (name, shape) of each parameter or buffer that files store differently, in the order of elements.

    `model` is a transformers model, also on the meta device. The result is empty if transformers cannot undo its conversions, or
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
        return {}
    # Small stand-ins of the parameters, whose elements say where they are in which parameter.
    stand_ins: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(parameters.items()):
        converter = next((one for one, undo in reversed_converters if undo.rename_source_key(name)[1] is not None), None)
        if converter is not None and not can_fuse(converter):
            return {}
        # Fused parameters are split along their first two dimensions only.
        reduced = (*shape[:2], *(1 for _ in shape[2:])) if converter is not None else (1,)
        stand_ins[name] = torch.arange(math.prod(reduced)).view(reduced) + number * _STRIDE
    names = list(parameters)
    parts: dict[str, list[tuple[int, str, Shape]]] = {name: [] for name in names}
    for stored_name, stand_in in revert_weight_conversion(model, stand_ins).items():
        first = int(stand_in.flatten()[0])
        name, start = names[first // _STRIDE], first % _STRIDE
        if stand_ins[name].shape == (1,):
            parts[name].append((0, stored_name, parameters[name]))
            continue
        if not torch.equal(stand_in.flatten(), torch.arange(first, first + stand_in.numel())):
            return {}
        rest = parameters[name][2:]
        own = tuple(stand_in.shape[: stand_in.dim() - len(rest)])
        parts[name].append((start * math.prod(rest), stored_name, (*own, *rest)))
    stored = {name: [(stored_name, shape) for _, stored_name, shape in sorted(found)] for name, found in parts.items()}
    if any(sum(math.prod(shape) for _, shape in stored[name]) != math.prod(parameters[name]) for name in names):
        return {}
    return {name: tensors for name, tensors in stored.items() if tensors != [(name, parameters[name])]}
