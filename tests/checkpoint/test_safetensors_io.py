from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launcher import atomic_files
from launcher.checkpoint import safetensors_io, store
from launcher.checkpoint.safetensors_io import ShardSet, TensorFile, TensorSpec, as_bytes
from launcher.errors import CheckpointError

TENSORS = {
    "a|fp32": torch.arange(7.0),
    "empty": torch.empty(0),
    "half": torch.ones(2, 3).bfloat16(),
    "bytes": torch.arange(5).byte(),
}
SPECS = [
    TensorSpec("a|fp32", "F32", (7,)),
    TensorSpec("empty", "F32", (0,)),
    TensorSpec("half", "BF16", (2, 3)),
    TensorSpec("bytes", "U8", (5,)),
]


def test_the_safetensors_library_reads_our_files(tmp_path):
    path = tmp_path / "x.safetensors"
    entry = safetensors_io.write(path, SPECS, map(as_bytes, TENSORS.values()), {"format": "pt"})
    assert entry == atomic_files.digest_file(path)
    assert entry.size == safetensors_io.file_bytes(SPECS, {"format": "pt"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_of_the_safetensors_library_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    file = TensorFile(path)
    out = torch.empty(3)
    file.read_into("a|fp32", 2, as_bytes(out))
    assert out.tolist() == [2, 3, 4]
    last = max(file.specs.values(), key=lambda spec: file._starts[spec.name])
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="ends early"):
        file.read_into(last.name, 0, memoryview(bytearray(last.num_bytes)))
    file.close()


def test_a_truncated_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="were written"):
        safetensors_io.write(tmp_path / "x", SPECS, [as_bytes(TENSORS["a|fp32"])], {})


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_range_is_read_across_shards(tmp_path, world_size):
    whole = {n: torch.randn(n) for n in (1, 2, 3, 7, 10)}
    for rank in range(world_size):
        parts = {n: tensor[slice(*store.partition(n, world_size, rank))] for n, tensor in whole.items()}
        specs = [TensorSpec(str(n), "F32", tuple(part.shape)) for n, part in parts.items()]
        safetensors_io.write(tmp_path / store.shard_name(rank), specs, map(as_bytes, parts.values()), {})
    with ShardSet(tmp_path, world_size) as shards:
        for n, tensor in whole.items():
            for start in range(n):
                for stop in range(start, n + 1):
                    out = torch.empty(stop - start)
                    shards.read_into(str(n), n, start, as_bytes(out))
                    assert torch.equal(out, tensor[start:stop])
