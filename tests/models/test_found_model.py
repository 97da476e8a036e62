"""Models on disk are found without a network; all faults of a folder are reported at once, each with its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.config.sections.model import ModelSection
from launcher.errors import Problem
from launcher.models import found_model
from launcher.models.found_model import file_problems, find_model, folder_problems
from launcher.models.weight_files import count_parameters

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub model in huggingface_hub's cache, as after a complete download, but still without weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_hub_model_is_located_once_all_its_weights_are_downloaded(snapshot: Path) -> None:
    model = ModelSection(path="owner/name")
    assert found_model.locate("owner/name", model).folder is None
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(3, 2)}, snapshot / "model-00001-of-00002.safetensors")
    assert found_model.locate("owner/name", model).folder is None
    save_file({"b": torch.zeros(5)}, snapshot / "model-00002-of-00002.safetensors")
    assert found_model.locate("owner/name", model).folder == snapshot
    assert count_parameters(snapshot, {}) == 11


@pytest.mark.parametrize(("is_tied", "num_params"), [(True, 4 * 3 + 2), (False, 2 * 4 * 3 + 2)])
def test_a_tied_head_that_is_stored_counts_once(snapshot: Path, is_tied: bool, num_params: int) -> None:
    sizes = {"hidden_size": 3, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 4}
    (snapshot / "config.json").write_text(json.dumps({"model_type": "qwen3", "tie_word_embeddings": is_tied, **sizes}))
    weights = {"model.embed_tokens.weight": torch.zeros(4, 3), "model.norm.weight": torch.zeros(2)}
    save_file({**weights, "lm_head.weight": torch.zeros(4, 3)}, snapshot / "model.safetensors")
    facts = find_model(ModelSection(path="owner/name")).facts
    assert (facts.num_params, facts.num_params_exact) == (num_params, True)


def test_layers_that_predict_further_tokens_do_not_count(snapshot: Path) -> None:
    """Files of DeepSeek-V3 and GLM-4.5 hold a layer after the last one, which transformers does not load."""
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    save_file({name: torch.zeros(4, 3) for name in (*names, "model.layers.2.enorm.weight")}, snapshot / "model.safetensors")
    assert count_parameters(snapshot, {"num_hidden_layers": 2}) == 3 * 4 * 3
    assert count_parameters(snapshot, {"num_hidden_layers": None}) == 4 * 4 * 3


def test_a_revision_belongs_to_the_model_and_not_to_another_tokenizer(snapshot: Path) -> None:
    model = ModelSection(path="./somewhere", tokenizer="owner/name", revision="other")
    assert found_model.locate("owner/name", model).folder == snapshot


@pytest.mark.parametrize(
    "files, expected",
    [
        (("config.json",), "holds no weights"),
        (("config.json", "pytorch_model.bin"), "pickled"),
        (("config.json", "model.safetensors"), "not a complete safetensors file"),
    ],
)
def test_a_model_folder_is_checked_before_anything_starts(tmp_path: Path, files: tuple[str, ...], expected: str) -> None:
    for name in files:
        (tmp_path / name).write_text(json.dumps(CONFIG) if name == "config.json" else "{}")
    (problem,) = find_model(ModelSection(path=str(tmp_path))).problems
    assert expected in str(problem)
    assert problem.remedy


def test_a_missing_model_is_reported_with_its_remedy(tmp_path: Path) -> None:
    (problem,) = find_model(ModelSection(path=str(tmp_path / "nowhere"))).problems
    assert "no such folder" in problem.message
    (problem,) = find_model(ModelSection(path="package:no_such_package/file.gguf")).problems
    assert "pip install" in problem.remedy


def test_a_local_folder_is_taken_before_a_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "models/good").mkdir(parents=True)
    assert found_model.local_folder("models/good") == "./models/good"
    assert found_model.local_folder("models/other") == "models/other"
    (tmp_path / "models/file").touch()
    for path in ("./models/qwen3-8b/", "some/models/good", "./models/file"):
        (problem,) = find_model(ModelSection(path=path)).problems
        assert (problem.where, problem.value) == ("model.path", path)
    (tmp_path / "models/good/config.json").touch()
    (problem,) = find_model(ModelSection(path="./models")).problems
    assert problem.message == "model.path: the folder has no config.json"
    assert problem.remedy == "did you mean models/good?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    names = [f"model-{i}.safetensors" for i in range(6)]
    for i, name in enumerate(names):
        save_file({f"t{i}": torch.zeros(4, 4)}, tmp_path / name)
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def problems(folder: Path, **settings: Any) -> list[Problem]:
    return folder_problems(folder, ModelSection(path=str(folder), **settings))


def test_a_whole_folder_has_no_problems(folder: Path) -> None:
    assert problems(folder) == []
    # The code of an architecture that transformers knows is not needed.
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {"AutoConfig": "m.C"}}))
    assert problems(folder) == []


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"a": 1,\n "b": }', ":2:7"),
        (b"[1]", ""),
        (b"\xff\xfe", ""),
        (b'{"hidden_size": 4}', ""),
    ],
)
def test_a_damaged_config_is_named_with_line_and_column(folder: Path, content: bytes, where: str) -> None:
    (folder / "config.json").write_bytes(content)
    (problem,) = problems(folder)
    assert problem.where == f"{folder / 'config.json'}{where}"
    assert problem.remedy


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", POINTER), ("tokenizer.json", b"<html>"), ("tokenizer.model", b"")]
)
def test_a_tokenizer_that_was_not_downloaded_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    (problem,) = problems(folder)
    assert problem.message.startswith(f"model.path: {name} ")
    # This does not matter if another tokenizer is used.
    assert problems(folder, tokenizer="owner/name") == []
    (problem,) = file_problems(folder, key="model.tokenizer")
    assert problem.message.startswith(f"model.tokenizer: {name} ")


@pytest.mark.parametrize(
    "changes",
    [
        {"is_encoder_decoder": True, "model_type": "t5"},
        {"vision_config": {"depth": 2}, "model_type": "qwen3_5"},
        {"quantization_config": {"quant_method": "awq"}},
        {"model_type": "mine", "auto_map": {"AutoConfig": "m.C"}},
        {"model_type": "mine"},
        {"vocab_size": None},
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_its_config(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (problem,) = problems(folder)
    assert problem.where == str(folder / "config.json")
    assert problem.remedy


def test_all_damaged_files_are_named_at_once(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}))
    (folder / "model-0.safetensors").write_bytes(POINTER)
    (folder / "model-1.safetensors").write_bytes(b"<!DOCTYPE html>")
    cut = (folder / "model-2.safetensors").read_bytes()[:-1]
    (folder / "model-2.safetensors").write_bytes(cut)
    (folder / "model-3.safetensors").write_bytes(cut[:20])
    (folder / "model-4.safetensors").unlink()
    messages = [problem.message for problem in problems(folder)]
    assert "gptq" in messages[0]
    for named, message in zip((4, 0, 1, 2, 3), messages[1:], strict=True):
        assert f"model-{named}.safetensors" in message
    assert len(problems(folder, init="random")) == 1


@pytest.mark.parametrize(
    "content", [b"{", b"{}", b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": "../b.safetensors"}}', POINTER]
)
def test_a_damaged_index_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    (problem,) = problems(folder)
    assert "model.safetensors.index.json" in problem.message
