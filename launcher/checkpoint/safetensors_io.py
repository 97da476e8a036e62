"""Write and read safetensors files as a stream of bytes.

The library's own `save_file` needs every tensor in memory at once, and a digest would take a second pass over the file;
`safe_open` maps the file, so every page that was read counts as resident memory. This module digests a file while it writes
it, block by block, and reads by byte range into the caller's memory. The format (8 bytes of header length, a JSON header, raw
little-endian data) is documented at https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import xxhash

from launcher.checkpoint.store import partition, shard_name
from launcher.errors import CheckpointError
from launcher.runs.atomic_files import FileEntry, open_regular, write_file

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1, "BOOL": 1}
# Keys of a shard's header: the dtype of the compute weights (bf16, fp16 or fp32), and a JSON object that maps each parameter
# name to the `weight_digest` of this rank's part.
DTYPE = "dtype"
WEIGHTS = "weights"
_BUFFER = "buffer|"
# Incremental digest of a weight in pieces; its `hexdigest()` equals the `weight_digest` of the complete weight.
WeightDigest = xxhash.xxh3_64


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    # An export does not need torch; importing it would take longer than the export.
    import torch

    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def weight_digest(tensor_bytes: memoryview) -> str:
    """Return the XXH3-64 digest of a tensor's little-endian bytes, as 16 hex digits."""
    return WeightDigest(tensor_bytes).hexdigest()


def tensor_key(parameter: str, state: str) -> str:
    """Name in a shard of a parameter's `fp32` weights or of one of its optimizer states."""
    return f"{parameter}|{state}"


def buffer_key(name: str) -> str:
    """Name in rank 0's shard of a buffer of the model, such as the corrections of a router's scores."""
    return f"{_BUFFER}{name}"


def buffer_name(key: str) -> str | None:
    """Return the buffer that a tensor of rank 0's shard holds, None if it holds something else."""
    return key.removeprefix(_BUFFER) if key.startswith(_BUFFER) else None


def file_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> int:
    """Return the exact size in bytes of the file that `write` creates."""
    return len(_header(specs, metadata)) + sum(s.num_bytes for s in specs)


def write(path: Path, specs: Sequence[TensorSpec], blocks: Iterable[memoryview], metadata: Mapping[str, str]) -> FileEntry:
    """Write and fsync a safetensors file; `blocks` yields the bytes of all tensors in the order of `specs`, split anywhere.

    Put tensors with larger items first in `specs`, so that every tensor starts at a multiple of its item size.
    """
    entry = write_file(path, itertools.chain([_header(specs, metadata)], blocks))
    if entry.size != file_bytes(specs, metadata):
        raise ValueError(f"{path}: {entry.size} bytes were written for tensors of {file_bytes(specs, metadata)}")
    return entry


class TensorFile:
    """An open safetensors file; `specs` maps each name to its tensor, `metadata` is the header's text metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            self._descriptor = os.dup(file.fileno())
        try:
            raw = self._header()
            header = json.loads(raw)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.specs = {name: TensorSpec(name, h["dtype"], tuple(h["shape"])) for name, h in header.items()}
            self._starts = {name: 8 + len(raw) + h["data_offsets"][0] for name, h in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            self.close()
            raise CheckpointError("the header of a checkpoint file is damaged", where=str(path), value=str(error)) from error
        except BaseException:
            self.close()
            raise

    def _header(self) -> bytearray:
        length = bytearray(8)
        self._read(0, memoryview(length))
        num_bytes = int.from_bytes(length, "little")
        if num_bytes > os.fstat(self._descriptor).st_size:
            raise ValueError(f"its length would be {num_bytes:,} bytes")
        raw = bytearray(num_bytes)
        self._read(8, memoryview(raw))
        return raw

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from element `start` of its flattened form."""
        self._read(self._starts[name] + start * ITEM_BYTES[self.specs[name].dtype], out)

    def _read(self, offset: int, out: memoryview) -> None:
        while out:
            count = os.preadv(self._descriptor, [out], offset)
            if count == 0:
                raise CheckpointError("a checkpoint file ends early", where=str(self.path))
            out, offset = out[count:], offset + count

    def close(self) -> None:
        os.close(self._descriptor)


class ShardSet:
    """The shards of one checkpoint; reads each parameter as one flat tensor."""

    def __init__(self, path: Path, world_size: int) -> None:
        self.world_size = world_size
        self.path = path
        self._files: dict[int, TensorFile] = {}

    def shard(self, rank: int) -> TensorFile:
        if rank not in self._files:
            self._files[rank] = TensorFile(self.path / shard_name(rank))
        return self._files[rank]

    def buffers(self) -> list[TensorSpec]:
        """Return the buffers of the model that the checkpoint holds, by their names in the model."""
        named = ((buffer_name(key), spec) for key, spec in self.shard(0).specs.items())
        return [replace(spec, name=name) for name, spec in named if name is not None]

    def read_into(self, name: str, num_elements: int, start: int, out: memoryview) -> None:
        """Fill `out` with the fp32 elements from `start` of `name`, a tensor of `num_elements` over all shards."""
        stop = start + len(out) // ITEM_BYTES["F32"]
        per_rank = -(-num_elements // self.world_size)
        while start < stop:
            rank = start // per_rank
            first, last = partition(num_elements, self.world_size, rank)
            end = min(stop, last)
            num_bytes = (end - start) * ITEM_BYTES["F32"]
            self.shard(rank).read_into(name, start - first, out[:num_bytes])
            out, start = out[num_bytes:], end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (offset, offset + spec.num_bytes)}
        offset += spec.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
