"""The weight files' tensors that make up a parameter: fused in transformers' order, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter
from weight_tools import change_weights, save_model, without

from launcher.checkpoint import initial_weights
from launcher.checkpoint.initial_weights import ParameterSources, StoredTensor, can_fuse, find_sources
from launcher.errors import ConfigError
from launcher.models.weight_files import read_header

EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"


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
