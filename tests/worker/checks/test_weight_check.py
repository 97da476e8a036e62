"""Weight files are compared with the model by transformers' own rules, from their headers only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from weight_tools import change_weights, save_model, without

from launcher.config.compose import conf_dir
from launcher.config.schema import ModelSection
from launcher.errors import ConfigError
from launcher.models import weight_files
from launcher.models.weight_files import ShapeMismatch, WeightReport
from launcher.worker.checks import weight_check

PRESETS = {
    file.stem: settings["config"]
    for file in sorted((conf_dir() / "model").glob("*.yaml"))
    if "config" in (settings := yaml.safe_load(file.read_text()))
}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compared(folder: Path, **settings: object) -> WeightReport:
    return weight_check.compare(folder, ModelSection(path=str(folder), **settings))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        weight_check.require_weights(ModelSection(path=str(folder)), lambda line: None)
    assert all(problem.where == "model.path" and problem.remedy for problem in error.value.problems)
    return str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_of_every_preset_pass_and_a_missing_tensor_is_refused(preset: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", PRESETS[preset])
    assert compared(folder) == WeightReport()
    change_weights(folder, without("model.layers.1.self_attn.o_proj.weight"))
    assert "the weight files lack 1 tensor of the model: model.layers.1.self_attn.o_proj.weight" in refused(folder)


@pytest.mark.parametrize(
    "model_type, part",
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.1.{}.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.1.{}.weight"),
    ],
)
def test_parts_of_fused_tensors_are_named_as_the_files_name_them(model_type: str, part: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {"model_type": model_type})
    whole = load_file(folder / "model.safetensors")
    assert compared(folder) == WeightReport()
    parts = ("w1", "w2", "w3") if model_type == "mixtral" else ("gate_proj", "down_proj", "up_proj")
    for name in map(part.format, parts):
        assert name in whole
        # The norm is not part of the tensors that transformers cannot fuse, and must still be reported.
        change_weights(folder, lambda tensors, name=name: (tensors.update(whole), without(name, "model.norm.weight")(tensors)))
        assert compared(folder) == WeightReport(missing=tuple(sorted((name, "model.norm.weight"))))
        change_weights(folder, lambda tensors, name=name: tensors.update({**whole, name: torch.zeros(3, 5)}))
        assert compared(folder) == WeightReport(mismatched=(ShapeMismatch(name, (3, 5), tuple(whole[name].shape)),))


def test_fused_tensors_may_be_stored_as_the_model_has_them(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {"model_type": "qwen3_moe"}, save_original_format=False)
    assert compared(folder) == WeightReport()
    change_weights(folder, without("model.layers.0.mlp.experts.gate_up_proj"))
    assert compared(folder) == WeightReport(missing=("model.layers.0.mlp.experts.gate_up_proj",))


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_head_may_be_absent_where_it_is_tied_to_the_embedding(absent: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    change_weights(folder, without(absent))
    assert compared(folder) == WeightReport(missing=(absent,))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert compared(folder) == WeightReport()


def test_names_may_lack_the_prefix_of_the_body(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {**LLAMA, "tie_word_embeddings": True})
    transformers.AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    assert "norm.weight" in load_file(folder / "model.safetensors")
    assert compared(folder) == WeightReport()
    change_weights(folder, lambda tensors: tensors.update({"norm.weight": torch.zeros(3)}))
    assert compared(folder).mismatched == (ShapeMismatch("norm.weight", (3,), (16,)),)


def test_every_shard_of_the_index_counts(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA, max_shard_size="3KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert compared(folder) == WeightReport()
    change_weights(folder, without("model.norm.weight"), index["model.norm.weight"])
    assert compared(folder) == WeightReport(missing=("model.norm.weight",))


def test_a_shape_mismatch_reports_both_shapes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(40, 16)}))
    said = refused(folder)
    assert "in another shape than the model: lm_head.weight is [40, 16] in the files and [48, 16] in the model" in said
    assert "config.json" in said


def test_unexpected_tensors_are_listed_and_accepted(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    change_weights(folder, lambda tensors: tensors.update({f"vision.{i}": torch.zeros(2) for i in range(7)}))
    model = ModelSection(path=str(folder))
    weight_check.require_weights(model, lambda line: None)
    report = weight_files.load_report(folder, model)
    assert report is not None
    assert report.problems(folder, model) == []
    assert "does not have 7 tensors of the weight files; they are not loaded: vision.0, vision.1" in str(report.note)
    assert str(report.note).endswith("vision.4 and 2 more")


def test_pickled_weights_are_compared_where_they_are_allowed(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert compared(folder, allow_pickled_weights=True) == WeightReport()
    torch.save({name: tensor for name, tensor in tensors.items() if "norm" not in name}, folder / "pytorch_model.bin")
    assert len(compared(folder, allow_pickled_weights=True).missing) == 5


def test_a_model_of_70_billion_parameters_is_compared_without_its_data(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(**PRESETS["llama3_3_70b"])
    config.save_pretrained(tmp_path)
    model_class = transformers.AutoModelForCausalLM  # import here: not on the meta device
    with torch.device("meta"):
        needed = model_class.from_config(config).state_dict()
    entries, end = {}, 0
    for name, tensor in needed.items():
        begin, end = end, end + 2 * tensor.numel()
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        # A sparse file: its 131 GiB use no disk space, and would not fit in memory.
        file.truncate(8 + len(header) + end)
    assert compared(tmp_path) == WeightReport()


def test_a_comparison_is_made_once_for_the_same_headers(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    model, lines = ModelSection(path=str(folder)), []
    weight_check.require_weights(model, lines.append)
    assert lines == ["comparing the weight files with the model (once)"]
    weight_check.require_weights(model, lines.append)
    assert len(lines) == 1
    change_weights(folder, without("model.norm.weight"))
    for _ in range(2):
        assert "model.norm.weight" in refused(folder)


def test_a_failed_comparison_is_reported_and_not_cached(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    (folder / "config.json").write_text('{"model_type": "clip"}')
    model, lines = ModelSection(path=str(folder)), []
    weight_check.require_weights(model, lines.append)
    assert lines[1].startswith("note: the weight files could not be compared with the model: ValueError")
    assert weight_files.load_report(folder, model) is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_type": "from_the_future"}, "The checkpoint you are trying to load has model type `from_the_future`"),
        ({"hidden_size": 21, "num_attention_heads": 2}, "ValueError: The hidden size (21) is not a multiple of the number of"),
    ],
)
def test_a_config_that_transformers_does_not_accept_is_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert f"transformers does not accept config.json: {reason}" in refused(folder)


def test_random_weights_need_no_files(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    (folder / "model.safetensors").unlink()
    weight_check.require_weights(ModelSection(path=str(folder), init="random"), pytest.fail)


def test_a_hub_model_that_stays_incomplete_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="incomplete after the download"):
        weight_check.require_weights(ModelSection(path="owner/name"), pytest.fail)
