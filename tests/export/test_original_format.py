"""An export stores parameters and buffers as the base model's own files do: under the same names, with separate experts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from forked_ranks import RankServer
from safetensors.torch import load_file
from weight_tools import EXPERTS, ROUTER_BUFFER, SIZES, change_weights, save_model

from launcher.checkpoint import store
from launcher.checkpoint.state import read_state
from launcher.export import original_format
from launcher.export.hf_folder import ExportTask, export
from launcher.export.original_format import find_stored_tensors
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


def test_a_model_whose_conversion_is_not_known_keeps_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    monkeypatch.setattr(original_format, "can_fuse", lambda converter: False)
    assert find_stored_tensors(model, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}) == {}


@pytest.mark.rest
def test_experts_and_buffers_of_a_trained_model_are_exported(rank_server: RankServer, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", {"model_type": "deepseek_v3", "dtype": torch.bfloat16})
    change_weights(base, lambda tensors: [tensors[name].normal_() for name in tensors if name.endswith(ROUTER_BUFFER)])
    restored = rank_server.values("export_ranks:save_trained", [[str(base), str(tmp_path / "saved")]] * 2, tmp_path / "ranks")
    (buffer,) = {name for names in restored for name in names}
    assert restored == [[buffer], [buffer]]
    checkpoint = store.get_latest(tmp_path / "saved").path
    task = ExportTask(checkpoint=checkpoint, model=base, tokenizer=None, out=tmp_path / "export")
    made = export(task)
    assert made.parity is not None
    assert made.num_compared == len(read_state(checkpoint).parameters)
    exported, original = load_file(made.path / "model.safetensors"), load_file(base / "model.safetensors")
    assert {name: tensor.shape for name, tensor in exported.items()} == {name: tensor.shape for name, tensor in original.items()}
    assert {name for name, tensor in exported.items() if tensor.dtype != torch.bfloat16} == {buffer}
    assert [name for name in original if torch.equal(exported[name], original[name])] == [buffer]
    assert made.num_parameters == sum(tensor.numel() for name, tensor in exported.items() if name != buffer)
    assert made.num_bytes == sum(tensor.nbytes for tensor in exported.values())
    # Several files, in a wider and in the same dtype; without a check, the names are the same.
    for dtype in ("fp32", "bf16"):
        parts = export(ExportTask(checkpoint, base, None, tmp_path / dtype, dtype=dtype, max_file_bytes=4000, check=False))
        assert len(parts.files) > 2
        names = [name for file in parts.files for name in read_header(parts.path / file)]
        assert sorted(names) == sorted(original)
        assert torch.equal(load_file(parts.path / parts.files[0])[buffer], original[buffer])
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(parts.path, output_loading_info=True)
        assert {kind: keys for kind, keys in info.items() if keys} == {}
        assert loaded.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
