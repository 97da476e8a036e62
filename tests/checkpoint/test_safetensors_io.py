"""Tensor files, and the tensors that make up a parameter: fused in transformers' order, or refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter
from weight_tools import change_weights, save_model, without

from launcher.checkpoint import initial_weights, safetensors_io, store
from launcher.checkpoint.initial_weights import ParameterSources, StoredTensor, can_fuse, find_sources
from launcher.checkpoint.safetensors_io import ShardSet, TensorFile, TensorSpec, as_bytes
from launcher.errors import CheckpointError, ConfigError
from launcher.models.weight_files import read_header
from launcher.runs import atomic_files

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
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"


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


class OwnMerge(MergeModulelist):
    """An operation with an order of its own, for all that is known."""


@pytest.mark.parametrize(
    "operations, num_sources, is_known",
    [
        ([MergeModulelist(dim=0), Concatenate(dim=1)], 2, True),
        ([MergeModulelist(dim=0)], 1, True),
        ([MergeModulelist(dim=0)], 2, False),
        ([MergeModulelist(dim=1)], 1, False),
        ([MergeModulelist(dim=0), Concatenate(dim=0)], 2, False),
        ([MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)], 2, False),
        ([Concatenate(dim=1)], 2, False),
        ([OwnMerge(dim=0)], 1, False),
    ],
)
def test_only_known_operations_are_fused_here(operations: list[Any], num_sources: int, is_known: bool) -> None:
    patterns = [f"experts.*.w{index}.weight" for index in range(num_sources)]
    assert can_fuse(WeightConverter(patterns, "experts.fused", operations)) == is_known


def test_parts_that_the_files_lack_or_have_twice(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {"model_type": "mixtral"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    file = folder / "model.safetensors"

    def find() -> ParameterSources | None:
        headers = read_header(file).items()
        return find_sources(model, {name: StoredTensor(file, name, one.dtype, one.shape, one.offset) for name, one in headers})

    sources = find()
    assert sources is not None
    assert not sources.missing
    name = "model.layers.1.mlp.experts.gate_up_proj"
    source = sources.by_name[name]
    assert source.shape == tuple(model.get_parameter(name).shape)
    assert [part.name for part in source.parts[:3]] == [EXPERT.format(0, "w1"), EXPERT.format(0, "w3"), EXPERT.format(1, "w1")]
    # The last expert, and an expert of the other pattern.
    lacking = (EXPERT.format(3, "w1"), EXPERT.format(0, "w3"))
    change_weights(folder, without(*lacking))
    sources = find()
    assert sources is not None
    assert set(sources.missing) == set(lacking)
    # Which of the two transformers takes is not known.
    save_model(folder, {"model_type": "mixtral"})
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(source.shape)}))
    assert find() is None


def test_a_file_that_ends_within_an_expert_is_named_with_the_tensor(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(16))
    part = StoredTensor(file, EXPERT.format(0, "w1"), "F32", (2, 2), 8)
    with pytest.raises(ConfigError, match="it ends within the tensor " + EXPERT.format(0, "w1")) as raised:
        initial_weights._read(initial_weights.ParameterSource((1, 2, 2), (part,)), 0, 4, torch.empty(4))
    assert raised.value.problems[0].value == str(file)
