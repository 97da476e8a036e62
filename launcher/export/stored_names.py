"""Which tensors of an export hold which parameters and buffers of the model, as transformers' `save_pretrained` stores them.

transformers fuses the experts of a layer into a few parameters and renames others when it loads a model. Other programs, such as
inference servers, know only the names of the original files. torch is imported only if the names must be found out.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import json_records
from launcher.errors import ConfigError
from launcher.models.weight_files import read_header, weight_files

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
_DEADLINE_S = 300
# More than the blocks of any parameter.
_STRIDE = 2**32


@dataclass(frozen=True)
class StoredNames:
    """The stored tensors (name, shape) of each parameter or buffer that files store differently from the model.

    `are_original` is false if it is not known how the original model's files store them.
    """

    tensors: dict[str, tuple[tuple[str, Shape], ...]]
    are_original: bool


def find_stored_names(built: Any, saved: Mapping[str, Shape]) -> StoredNames:
    """Find the stored names of `saved` parameters and buffers of a transformers model, which may be on the meta device."""
    stored = find_stored_tensors(built, saved)
    return StoredNames({name: tuple(tensors) for name, tensors in (stored or {}).items()}, are_original=stored is not None)


def find_stored_tensors(model: Any, parameters: Mapping[str, Shape]) -> dict[str, list[tuple[str, Shape]]] | None:
    """Return the stored tensors (name, shape) of each parameter or buffer that files store differently, in the order of elements.

    `model` is a transformers model, also on the meta device. The result is None if transformers cannot undo its conversions, or
    if the elements of a stored tensor are not consecutive in the parameter.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion

    from launcher.checkpoint.initial_weights import can_fuse

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


def try_to_find_stored_names(folder: Path, trust_remote_code: bool, saved: Mapping[str, Shape], output: Path) -> None:
    """Write a StoredNames record by the config of a folder; the names of the model if transformers cannot build it.

    A separate process finds them, because this one may have imported transformers without torch.
    """
    command = [sys.executable, "-P", "-m", "launcher.export.stored_names", str(folder), str(output), str(int(trust_remote_code))]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, input=json.dumps(saved), text=True, capture_output=True, timeout=_DEADLINE_S)
    if not output.exists():
        json_records.write(output, StoredNames({}, are_original=False))


def stores_as_is(model: Path | Mapping[str, Any], saved: Mapping[str, Shape]) -> bool:
    """Return whether the base model's own files store all tensors under their names in the model."""
    if not isinstance(model, Path):
        return False
    try:
        files = [file for file in weight_files(model, with_pickled=False) if file.is_file()]
        return saved.keys() <= {name for file in files for name in read_header(file)}
    except (ConfigError, OSError):
        return False


def main(folder: str, output: str, trust_remote_code: str) -> None:
    """Run as a process that `try_to_find_stored_names` starts; reads the names and shapes of the saved tensors from stdin."""
    from launcher.export.parity import build_on_meta

    saved = {name: tuple(shape) for name, shape in json.load(sys.stdin).items()}
    json_records.write(Path(output), find_stored_names(build_on_meta(Path(folder), trust_remote_code == "1"), saved))


if __name__ == "__main__":
    main(*sys.argv[1:])
