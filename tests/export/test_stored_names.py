"""An export stores parameters and buffers as the base model's own files do: under the same names, with separate experts."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from forked_ranks import RankServer
from safetensors.torch import load_file
from shard_tools import flip_bit
from transformers.core_model_loading import WeightConverter
from weight_tools import EXPERTS, ROUTER_BUFFER, SIZES, change_weights, save_model

from launcher.checkpoint import initial_weights, store
from launcher.checkpoint.safetensors_io import buffer_key
from launcher.checkpoint.state import read_state
from launcher.errors import CheckpointError
from launcher.export.hf_folder import ExportTask, describe_names, export
from launcher.export.parity import require_same_tensors
from launcher.export.stored_names import find_stored_tensors
from launcher.models.weight_files import read_header


def build(model_type: str) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(**{"model_type": model_type, **SIZES, **EXPERTS.get(model_type, {})})
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", ["llama", *EXPERTS])
def test_parameters_are_split_and_named_as_transformers_saves_them(tmp_path: Path, model_type: str) -> None:
    model = build(model_type)
    model.save_pretrained(tmp_path)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    with torch.device("meta"):
        empty = build(model_type)
    found = find_stored_tensors(empty, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert bool(found) == (model_type in EXPERTS)
    stored = {}
    for name, tensor in tensors.items():
        parts = found.get(name, [(name, tuple(tensor.shape))])
        elements = tensor.reshape(-1).split([math.prod(shape) for _, shape in parts])
        stored |= {part: own.view(shape) for (part, shape), own in zip(parts, elements, strict=True)}
    expected = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, stored[name])] == []


def refuse(*_: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize(
    "place, replacement",
    [(initial_weights, {"can_fuse": lambda converter: False}), (WeightConverter, {"reverse_transform": refuse})],
)
def test_a_conversion_that_cannot_be_undone_is_none(
    monkeypatch: pytest.MonkeyPatch, place: object, replacement: dict[str, object]
) -> None:
    model = build("mixtral")
    ((name, value),) = replacement.items()
    monkeypatch.setattr(place, name, value)
    assert find_stored_tensors(model, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}) is None


def test_a_checkpoint_without_the_buffers_of_the_model_is_refused() -> None:
    model = build("deepseek_v3")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.gate\.e_score_correction_bias"):
        require_same_tensors(model, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})


@pytest.mark.rest
def test_trained_models_have_the_tensors_of_their_original_files(rank_server: RankServer, tmp_path: Path) -> None:
    """Experts, buffers, a frozen parameter (ERNIE 4.5), and an architecture that only eager attention computes (gpt-oss)."""
    with_buffers = ("deepseek_v3", "ernie4_5_moe")
    folders = [
        save_model(tmp_path / model_type, {"model_type": model_type, "dtype": torch.bfloat16})
        for model_type in (*with_buffers, "gpt_oss")
    ]
    for name in with_buffers:
        change_weights(
            tmp_path / name, lambda tensors: [tensors[one].normal_() for one in tensors if one.endswith(ROUTER_BUFFER)]
        )
    saved = tmp_path / "saved"
    saved.mkdir()
    arguments = [[[str(folder) for folder in folders], str(saved)]] * 2
    first, second = rank_server.values("export_ranks:save_trained", arguments, tmp_path / "ranks")
    assert first == second
    for base, buffers in zip(folders, first, strict=True):
        checkpoint = store.get_latest(saved / base.name).path
        made = export(ExportTask(checkpoint=checkpoint, model=base, tokenizer=None, out=tmp_path / "export" / base.name))
        assert made.parity is not None
        assert made.num_compared == len(read_state(checkpoint).parameters)
        exported, original = load_file(made.path / "model.safetensors"), load_file(base / "model.safetensors")
        assert {name: one.shape for name, one in exported.items()} == {name: one.shape for name, one in original.items()}
        assert len(buffers) == (base.name in with_buffers)
        corrections = {name for name in original if name.endswith(ROUTER_BUFFER)}
        assert len(corrections) == len(buffers)
        unchanged = {name for name in original if torch.equal(exported[name], original[name])}
        assert corrections <= unchanged
        assert len(unchanged) < len(original) / 2
        assert made.num_parameters == sum(one.numel() for name, one in exported.items() if name not in corrections)
        assert made.num_bytes == sum(one.nbytes for one in exported.values())
    # Without a model that transformers can build, the tensors keep their names in the model.
    task = ExportTask(store.get_latest(saved / "gpt_oss").path, folders[2], None, tmp_path / "unknown", check=False)
    assert export(task).has_original_names
    made = export(replace(task, model={"model_type": "unknown", "architectures": ["Unknown"]}, out=tmp_path / "other"))
    assert not made.has_original_names
    assert describe_names(made)
    # Several files, in a wider and in the same dtype; without a check, the names are the same.
    base = folders[0]
    original = load_file(base / "model.safetensors")
    (buffer,) = first[0]
    for dtype in ("fp32", "bf16"):
        task = ExportTask(store.get_latest(saved / base.name).path, base, None, tmp_path / dtype, dtype=dtype, check=False)
        parts = export(replace(task, max_file_bytes=4000))
        assert len(parts.files) > 2
        assert sorted(name for file in parts.files for name in read_header(parts.path / file)) == sorted(original)
        assert torch.equal(load_file(parts.path / parts.files[0])[buffer], original[buffer])
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(parts.path, output_loading_info=True)
        assert {kind: keys for kind, keys in info.items() if keys} == {}
        assert loaded.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    # A damaged buffer, which hardly changes the logits of a random model.
    damaged = tmp_path / "damaged" / task.checkpoint.name
    shutil.copytree(task.checkpoint, damaged)
    flip_bit(damaged, 0, buffer_key(buffer), bit=20)
    with pytest.raises(CheckpointError, match="differs from the engine's") as refused:
        export(replace(task, checkpoint=damaged, out=tmp_path / "from-damaged"))
    assert refused.value.problems[0].where.startswith(f"{buffer}, in ")
