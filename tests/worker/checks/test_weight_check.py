"""Weight files are compared with the model by transformers' own rules, from their headers only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from weight_tools import change_weights, save_model, without

from launcher.config.compose import conf_dir
from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError
from launcher.models import weight_files
from launcher.models.found_model import find_model
from launcher.models.weight_files import WeightReport
from launcher.worker.checks import model_check

# One preset of each architecture.
PRESETS = {
    settings["config"]["model_type"]: settings["config"]
    for file in sorted((conf_dir() / "model").glob("*.yaml"))
    if "config" in (settings := yaml.safe_load(file.read_text()))
}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compared(folder: Path, **settings: object) -> WeightReport:
    return model_check.compare_weights(folder, ModelSection(path=str(folder), **settings))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        model_check.require_weights(find_model(ModelSection(path=str(folder))), lambda line: None)
    assert all(problem.where == "model.path" and problem.remedy for problem in error.value.problems)
    return str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_of_every_preset_pass_and_a_missing_tensor_is_refused(preset: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", PRESETS[preset])
    assert compared(folder) == WeightReport()
    change_weights(folder, without("model.layers.1.self_attn.o_proj.weight"))
    assert "model.layers.1.self_attn.o_proj.weight" in refused(folder)


def test_a_missing_part_of_a_fused_tensor_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {"model_type": "mixtral"})
    assert compared(folder) == WeightReport()
    change_weights(folder, without("model.layers.1.block_sparse_moe.experts.1.w1.weight"))
    assert "do not fit the model" in refused(folder)


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_head_may_be_absent_where_it_is_tied_to_the_embedding(absent: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    change_weights(folder, without(absent))
    assert compared(folder) == WeightReport(missing=(absent,))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert compared(folder) == WeightReport()


def test_a_shape_mismatch_reports_both_shapes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(40, 16)}))
    assert "lm_head.weight is [40, 16] in the files and [48, 16] in the model" in refused(folder)


def test_unexpected_tensors_are_listed_and_accepted(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    change_weights(folder, lambda tensors: tensors.update({f"vision.{i}": torch.zeros(2) for i in range(7)}))
    model = ModelSection(path=str(folder))
    model_check.require_weights(find_model(model), lambda line: None)
    report = weight_files.load_report(folder, model)
    assert report is not None
    assert report.problems(folder, model) == []
    assert "7 tensors" in str(report.note)


def test_pickled_weights_are_compared_where_they_are_allowed(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert compared(folder, allow_pickled_weights=True) == WeightReport()
    torch.save({name: tensor for name, tensor in tensors.items() if "norm" not in name}, folder / "pytorch_model.bin")
    assert len(compared(folder, allow_pickled_weights=True).missing) == 5


def test_a_comparison_is_made_once_for_the_same_headers(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    model, lines = ModelSection(path=str(folder)), []
    model_check.require_weights(find_model(model), lines.append)
    assert lines == ["comparing the weight files with the model (once)"]
    model_check.require_weights(find_model(model), lines.append)
    assert len(lines) == 1
    change_weights(folder, without("model.norm.weight"))
    for _ in range(2):
        assert "model.norm.weight" in refused(folder)


def test_a_failed_comparison_is_reported_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> WeightReport:
        raise ImportError("no such kernel")

    monkeypatch.setattr(model_check, "compare_weights", fail)
    folder = save_model(tmp_path / "model", LLAMA)
    model, lines = ModelSection(path=str(folder)), []
    model_check.require_weights(find_model(model), lines.append)
    assert "ImportError: no such kernel" in lines[1]
    assert weight_files.load_report(folder, model) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "from_the_future"}, "from_the_future"),
        ({"model_type": "clip"}, "Unrecognized configuration class"),
        ({"hidden_size": 21, "num_attention_heads": 2}, "hidden size (21)"),
    ],
)
def test_a_config_that_transformers_does_not_accept_is_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert reason in refused(folder)


def test_random_weights_need_no_files(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    (folder / "model.safetensors").unlink()
    model_check.require_weights(find_model(ModelSection(path=str(folder), init="random")), pytest.fail)


def test_a_hub_model_that_stays_incomplete_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="incomplete after the download"):
        model_check.require_weights(find_model(ModelSection(path="owner/name")), pytest.fail)
