"""Stream a checkpoint's weights from its shards into Hugging Face files, and compare them with the engine's on the way.

Needs only numpy: importing torch would take longer than the work itself, and more memory.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from launcher import atomic_files
from launcher.checkpoint import safetensors_io
from launcher.checkpoint.safetensors_io import (
    ShardSet,
    TensorSpec,
    WeightDigest,
    buffer_key,
    buffer_name,
    tensor_key,
    weight_digest,
)
from launcher.checkpoint.store import partition
from launcher.errors import CheckpointError

Shape = tuple[int, ...]
# The launcher's name of a dtype -> its name in safetensors files and in config.json.
DTYPES = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}
# transformers and the Hub use 5 GB per file.
MAX_FILE_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"

# Small enough that a block stays in the CPU cache from its cast to its digest and write.
_BLOCK_ELEMENTS = 2**19
_BF16_NAN = 0x7FC0


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

    `stored` has the names and shapes of the tensors that hold a parameter or a buffer, for those that files store differently.
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


def read_buffers(shards: ShardSet) -> list[TensorSpec]:
    """Return the buffers that a checkpoint holds, by their names in the model."""
    named = ((buffer_name(key), spec) for key, spec in shards.shard(0).specs.items())
    return [replace(spec, name=name) for name, spec in named if name is not None]


def read_engine_weights(shards: ShardSet) -> EngineWeights | None:
    """Read the engine's dtype and digests from the shards' headers, None if a shard has none.

    Raises:
        CheckpointError: if a header cannot be parsed, or the shards differ in dtype.
    """
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
    compare.

    Raises:
        CheckpointError: if a weight or a buffer differs from the engine's.
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
