"""Stream a checkpoint's weights from its shards into Hugging Face files, and compare them with the engine's on the way.

The tensors have the names that transformers' `save_pretrained` gives them: transformers fuses the experts of a layer into a few
parameters and renames others when it loads a model, and other programs, such as inference servers, know only the names of the
original files.

Needs only numpy: importing torch would take longer than the work itself, and more memory. It is imported only to find the names,
in a process of its own if this one may have imported transformers without torch.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from launcher.checkpoint import safetensors_io
from launcher.checkpoint.safetensors_io import (
    ShardSet,
    TensorSpec,
    WeightDigest,
    buffer_key,
    tensor_key,
    weight_digest,
)
from launcher.checkpoint.store import partition
from launcher.errors import CheckpointError, ConfigError
from launcher.models.weight_files import read_header, weight_files
from launcher.runs import atomic_files, json_records

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
# The launcher's name of a dtype -> its name in safetensors files and in config.json.
DTYPES = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}
# transformers and the Hub use 5 GB per file.
MAX_FILE_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"

# Small enough that a block stays in the CPU cache from its cast to its digest and write.
_BLOCK_ELEMENTS = 2**19
_BF16_NAN = 0x7FC0
_NAMES_DEADLINE_S = 300
# More than the blocks of any parameter.
_STRIDE = 2**32


@dataclass(frozen=True)
class StoredParameter:
    """A parameter of the model, and the tensors of a weight file that hold its elements, one tensor after the other."""

    name: str
    shape: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)


@dataclass(frozen=True)
class StoredBuffer:
    """A buffer of the model, and the tensor of a weight file that holds it."""

    name: str
    tensor: TensorSpec


@dataclass(frozen=True)
class FileLayout:
    """The parameters in each weight file, in `dtype`. The first file also holds the buffers, in their own dtypes."""

    dtype: str
    files: Mapping[str, Sequence[StoredParameter]]
    buffers: Sequence[StoredBuffer] = ()

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for file in self.files for spec in self.tensors(file))

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(parameter.shape) for parameters in self.files.values() for parameter in parameters)

    def buffers_in(self, file: str) -> tuple[list[StoredBuffer], list[StoredBuffer]]:
        """Return the buffers that a file holds before and after its parameters: tensors with larger elements come first."""
        own = self.buffers if file == next(iter(self.files)) else ()
        width = safetensors_io.ITEM_BYTES[DTYPES[self.dtype][0]]
        before = [buffer for buffer in own if safetensors_io.ITEM_BYTES[buffer.tensor.dtype] > width]
        return before, [buffer for buffer in own if buffer not in before]

    def tensors(self, file: str) -> list[TensorSpec]:
        """Return the tensors of a file in their order."""
        before, after = self.buffers_in(file)
        parameters = [spec for parameter in self.files[file] for spec in parameter.tensors]
        return [*(buffer.tensor for buffer in before), *parameters, *(buffer.tensor for buffer in after)]


@dataclass(frozen=True)
class EngineWeights:
    """The compute weights of the engine that saved: their dtype, and for each rank a digest by weight name."""

    dtype: str
    digests: Sequence[Mapping[str, str]]


def plan_files(
    parameters: Mapping[str, Shape],
    dtype: str,
    max_file_bytes: int = MAX_FILE_BYTES,
    buffers: Sequence[TensorSpec] = (),
    stored: Mapping[str, Sequence[tuple[str, Shape]]] | None = None,
) -> FileLayout:
    """Distribute parameters over files of at most `max_file_bytes`, unless one parameter alone is larger.

    `stored` has the names and shapes of the stored tensors for parameters and buffers that files store differently.
    """
    differing = stored or {}
    planned = {
        name: StoredParameter(
            name, shape, tuple(TensorSpec(part, DTYPES[dtype][0], own) for part, own in differing.get(name, [(name, shape)]))
        )
        for name, shape in parameters.items()
    }
    split = split_state_dict_into_shards_factory(
        {name: parameter.num_bytes for name, parameter in planned.items()},
        get_storage_size=lambda num_bytes: num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    own_buffers = sorted(buffers, key=lambda spec: -safetensors_io.ITEM_BYTES[spec.dtype])
    return FileLayout(
        dtype,
        {file: [planned[name] for name in names] for file, names in split.filename_to_tensors.items()},
        [
            StoredBuffer(spec.name, replace(spec, name=differing[spec.name][0][0] if spec.name in differing else spec.name))
            for spec in own_buffers
        ],
    )


def read_engine_weights(shards: ShardSet) -> EngineWeights | None:
    """Read the engine's dtype and digests from the shards' headers, None if a shard has none. Raises CheckpointError."""
    metadata = [shards.shard(rank).metadata for rank in range(shards.world_size)]
    if any(safetensors_io.WEIGHTS not in one for one in metadata):
        return None
    try:
        (dtype,) = {one[safetensors_io.DTYPE] for one in metadata}
        digests = [json.loads(one[safetensors_io.WEIGHTS]) for one in metadata]
        if dtype not in DTYPES or not all(isinstance(one, dict) for one in digests):
            raise ValueError(f"dtype {dtype}")
    except (ValueError, KeyError) as error:
        raise CheckpointError("the digests of a checkpoint's weights cannot be read", where=str(shards.path)) from error
    return EngineWeights(dtype, digests)


def write_files(
    shards: ShardSet,
    engine: EngineWeights | None,
    planned: FileLayout,
    names: Sequence[str],
    folder: Path,
    on_write: Callable[[int], None],
) -> None:
    """Write and fsync the files `names` of the layout into `folder`; `on_write` is called with the bytes of each block.

    The function takes the memory of three blocks of half a million elements, for any model size. With `engine` None, it does not
    compare. Raises CheckpointError if a weight or a buffer differs from the engine's.
    """

    def read_file(name: str) -> Iterator[memoryview]:
        before, after = planned.buffers_in(name)
        parameters = _parameter_blocks(shards, engine, planned.files[name], planned.dtype)
        for block in itertools.chain(_buffer_blocks(shards, engine, before), parameters, _buffer_blocks(shards, engine, after)):
            yield block
            on_write(block.nbytes)

    for name in names:
        safetensors_io.write(folder / name, planned.tensors(name), read_file(name), {"format": "pt"})


def write_index(planned: FileLayout, folder: Path) -> None:
    """Write the index of the weight files if there are several."""
    if len(planned.files) > 1:
        weight_map = {spec.name: file for file in planned.files for spec in planned.tensors(file)}
        atomic_files.write_json(folder / INDEX, {"metadata": {"total_size": planned.num_bytes}, "weight_map": weight_map})


def _buffer_blocks(shards: ShardSet, engine: EngineWeights | None, buffers: Iterable[StoredBuffer]) -> Iterator[memoryview]:
    """Yield the bytes of each buffer, compared with its digest."""
    for buffer in buffers:
        key, block = buffer_key(buffer.name), memoryview(bytearray(buffer.tensor.num_bytes))
        shards.shard(0).read_into(key, 0, block)
        if engine:
            _require_digest(shards, engine, 0, key, weight_digest(block), buffer.name)
        yield block


def _parameter_blocks(
    shards: ShardSet, engine: EngineWeights | None, parameters: Sequence[StoredParameter], dtype: str
) -> Iterator[memoryview]:
    """Yield the bytes of all parameters; each rank's part is read once and compared with that rank's digest."""
    fp32 = np.empty(_BLOCK_ELEMENTS, np.float32)
    casts = {name: _Cast(name) for name in {dtype, engine.dtype if engine else dtype}}
    for parameter in parameters:
        num_elements = math.prod(parameter.shape)
        for rank in range(shards.world_size):
            first, last = partition(num_elements, shards.world_size, rank)
            digest = WeightDigest()
            for start in range(first, last, _BLOCK_ELEMENTS):
                block = fp32[: last - start]
                shards.shard(rank).read_into(tensor_key(parameter.name, "fp32"), start - first, _bytes(block))
                blocks = {name: cast(block) for name, cast in casts.items()}
                if engine:
                    digest.update(blocks[engine.dtype])
                yield blocks[dtype]
            if engine and first < last:
                part = f"{parameter.name}, part of rank {rank}"
                _require_digest(shards, engine, rank, parameter.name, digest.hexdigest(), part)


def _require_digest(shards: ShardSet, engine: EngineWeights, rank: int, key: str, digest: str, part: str) -> None:
    expected = engine.digests[rank].get(key)
    if digest != expected:
        raise CheckpointError(
            "a weight of the checkpoint differs from the engine's",
            where=f"{part}, in {shards.shard(rank).path}",
            value=f"digest {digest}, the engine's is {expected or 'absent'}",
            remedy="export another checkpoint, and check the disk",
        )


class _Cast:
    """Casts fp32 blocks to another dtype; the returned bytes are valid until the next call."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._rounded = np.empty(_BLOCK_ELEMENTS if dtype == "bf16" else 0, np.uint32)
        self._out = np.empty(0 if dtype == "fp32" else _BLOCK_ELEMENTS, np.uint16 if dtype == "bf16" else np.float16)

    def __call__(self, block: np.ndarray) -> memoryview:
        if self._dtype == "fp32":
            return _bytes(block)
        out = self._out[: len(block)]
        if self._dtype == "fp16":
            with np.errstate(over="ignore"):  # values too large become infinite, as on a device
                np.copyto(out, block, casting="same_kind")
            return _bytes(out)
        # Keep the upper half of each float's bits, rounded to nearest, ties to even.
        bits, rounded = block.view(np.uint32), self._rounded[: len(block)]
        np.right_shift(bits, 16, out=rounded)
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        np.copyto(out, rounded.view("<u2")[1::2])
        # A NaN may have been rounded up into another number.
        if np.isnan(block.min()):
            out[np.isnan(block)] = _BF16_NAN
        return _bytes(out)


def _bytes(array: np.ndarray) -> memoryview:
    return array.data.cast("B")


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
    """Write a StoredNames record in a process of its own, as this one may have imported transformers without torch."""
    command = [sys.executable, "-P", "-m", "launcher.export.weights", str(folder), str(output), str(int(trust_remote_code))]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, input=json.dumps(saved), text=True, capture_output=True, timeout=_NAMES_DEADLINE_S)
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
