"""Ranks refuse missing weights and wrong shapes, in case the submit side did not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import RankServer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from weight_tools import ROUTER_BUFFER, SIZES, change_weights, save_model, without

from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError
from launcher.plan.architecture.facts import model_facts
from launcher.train.model import DTYPES, build_model

EXPERT = "model.layers.1.block_sparse_moe.experts.1.w1.weight"


def test_a_model_with_missing_weights_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {"model_type": "llama"})
    config = json.loads((folder / "config.json").read_text())
    facts = model_facts(config, str(folder), None, None)
    change_weights(folder, without("model.norm.weight"))
    with pytest.raises(ConfigError, match=r"lack 1 tensor of the model: model\.norm\.weight"):
        build_model(ModelSection(path=str(folder)), facts, "cpu", chunk_tokens=64)
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16)}))
    build_model(ModelSection(path=str(folder)), facts, "cpu", chunk_tokens=64)


@pytest.mark.rest
def test_ranks_under_zero3_refuse_weights_that_do_not_cover_the_model(rank_server: RankServer, tmp_path: Path) -> None:
    complete = save_model(tmp_path / "complete", {"model_type": "llama", "tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(complete / "model.safetensors")
    fused = save_model(tmp_path / "fused", {"model_type": "mixtral"})
    lacking = save_model(tmp_path / "lacking", {"model_type": "llama"})
    change_weights(lacking, without("model.norm.weight"))
    expert = save_model(tmp_path / "expert", {"model_type": "mixtral"})
    change_weights(expert, without(EXPERT))
    shape = save_model(tmp_path / "shape", {"model_type": "llama"})
    change_weights(shape, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    cut = save_model(tmp_path / "cut", {"model_type": "qwen3_moe"}) / "model.safetensors"
    os.truncate(cut, cut.stat().st_size // 2)
    misshapen = save_model(tmp_path / "misshapen", {"model_type": "mixtral"})
    change_weights(misshapen, lambda tensors: tensors.update({EXPERT: torch.zeros(3, 5)}))
    cases = [(str(folder), False) for folder in (complete, fused, lacking, expert, shape, cut.parent, misshapen)]
    (first, loaded), (second, not_counted) = rank_server.values(
        "train_ranks:build_models", [[cases], [cases]], tmp_path / "ranks"
    )
    assert (loaded[:2], not_counted[:2]) == ([num_bytes(complete), num_bytes(fused)],) * 2
    assert not any(not_counted[2:]), "only rank 0 reads what lacks something or has another shape"
    lacks = "model.path: the weight files lack 1 tensor of the model: "
    assert first[:4] == second[:4] == [None, None, lacks + "model.norm.weight", lacks + EXPERT]
    # Only rank 0 compares shapes, and its failure ends the run.
    assert "the weight files do not fit the model: size mismatch for model.norm.weight" in str(first[4])
    assert first[5] == second[5]
    assert "model.safetensors is not a complete safetensors file: " in str(first[5])
    for problems in (first, second):
        assert "Failed to apply weight conversion for 'model.layers.1.mlp.experts.gate_up_proj'" in str(problems[6])


@pytest.mark.rest
def test_each_rank_reads_its_own_part_of_the_weights_alone(rank_server: RankServer, tmp_path: Path) -> None:
    """The weights equal those that transformers loads: two dtypes, shards, experts stored separately and fused, buffers, hpZ."""
    sharded, already_fused = {"max_shard_size": "4KB"}, {"save_original_format": False}
    kinds: list[tuple[str, torch.dtype, dict[str, Any], str, int]] = [
        ("llama", torch.float32, {}, "fp32", 1),
        ("llama", torch.bfloat16, sharded, "fp32", 1),
        ("qwen3_moe", torch.bfloat16, sharded, "fp32", 1),
        ("qwen3_moe", torch.float32, already_fused, "bf16", 1),
        ("mixtral", torch.float32, {}, "fp32", 1),
        ("olmoe", torch.float32, sharded, "bf16", 1),
        ("deepseek_v3", torch.bfloat16, {}, "bf16", 1),
        ("llama", torch.bfloat16, {}, "bf16", 2),
    ]
    cases, sizes = [], []
    for number, (model_type, stored, saving, dtype, hpz_ranks) in enumerate(kinds):
        folder = save_model(tmp_path / str(number), {"model_type": model_type, "dtype": stored}, **saving)
        if model_type == "deepseek_v3":
            change_weights(folder, lambda tensors: [tensors[name].normal_() for name in tensors if name.endswith(ROUTER_BUFFER)])
        files = [load_file(file) for file in folder.glob("*.safetensors")]
        assert (len(files) > 1) == (saving is sharded)
        separate = any(".experts.1." in name for tensors in files for name in tensors)
        assert separate == (model_type != "llama" and saving is not already_fused)
        expected = tmp_path / f"{number}.safetensors"
        save_file(AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).state_dict(), expected)
        cases.append([str(folder), str(expected), dtype, hpz_ranks])
        # Each rank reads all of a buffer.
        reads = {
            name: tensor.nbytes * (1 + name.endswith(ROUTER_BUFFER)) for tensors in files for name, tensor in tensors.items()
        }
        sizes.append(sum(reads.values()))
    ranks = rank_server.values("weight_ranks:read_own_parts", [[cases]] * 2, tmp_path / "ranks")
    for kind, size, *results in zip(kinds, sizes, *ranks, strict=True):
        assert [differing for _, _, differing in results] == [[], []], kind
        assert sum(num for num, _, _ in results) == size, kind
        assert all(abs(num - size / 2) < 16 and largest <= size / 4 for num, largest, _ in results), kind


def num_bytes(folder: Path) -> int:
    """Count the bytes of the weights in a model folder."""
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.rest
def test_weights_that_a_checkpoint_replaces_are_not_read(rank_server: RankServer, tmp_path: Path) -> None:
    """Models with buffers that neither a checkpoint nor a weight file contains, such as position tables, are still read."""
    llama = save_model(tmp_path / "llama", {"model_type": "llama", "tie_word_embeddings": True})
    change_weights(llama, without("model.norm.weight"))
    deepseek = save_model(tmp_path / "deepseek", {"model_type": "deepseek_v3"})
    assert any(name.endswith(ROUTER_BUFFER) for name in load_file(deepseek / "model.safetensors"))
    small = {"n_embd": 16, "n_head": 4, "n_layer": 2, "rotary_dim": 4}
    codegen = save_model(tmp_path / "codegen", {"model_type": "codegen", **small})
    file = codegen / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **SIZES}))
    gemma = save_model(tmp_path / "gemma", {"model_type": "gemma3_text"})
    cases = [(str(folder), True) for folder in (llama, deepseek, codegen, gemma)]
    (problems, loaded), _ = rank_server.values("train_ranks:build_models", [[cases], [cases]], tmp_path / "ranks")
    assert problems == [None] * 4
    assert (loaded[0], loaded[1], loaded[3]) == (0, 0, 0)
    assert loaded[2] > num_bytes(codegen) / 2
