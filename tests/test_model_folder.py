"""Damaged and unsuitable model folders: each fault is reported with its file, and all faults at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.config.schema import ModelSection
from launcher.errors import Problem
from launcher.models.folder_check import file_problems, folder_problems

CONFIG = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


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


@pytest.mark.parametrize(
    "content, message, where",
    [
        (b'{"a": 1,\n "b": }', "is not valid JSON: Expecting value", ":2:7"),
        (b"", "is empty", ""),
        (b"[1]", "holds a JSON list instead of an object", ""),
        (b"\xff\xfe", "is not UTF-8 text: byte 0", ""),
        (b"[" * 100_000, "is nested too deeply", ""),
        (POINTER, "is a Git LFS pointer instead of the file", ""),
        (b"<html>", "is an HTML page", ""),
        (b'{"hidden_size": 4}', "has no model_type", ""),
    ],
)
def test_a_damaged_config_is_named_with_line_and_column(folder: Path, content: bytes, message: str, where: str) -> None:
    (folder / "config.json").write_bytes(content)
    (problem,) = problems(folder)
    assert problem.message == f"model.path: config.json {message}"
    assert problem.where == f"{folder / 'config.json'}{where}"
    assert problem.remedy


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", POINTER, "is a Git LFS pointer instead of the file"),
        ("tokenizer.json", b"<html>", "is an HTML page"),
        ("tokenizer.json", b'{"model": {"vo', "is not valid JSON: Unterminated string starting at"),
        ("tokenizer.json", b'{"model": "' + b"x" * (2 << 20), "is incomplete: it does not end with }"),
        ("tokenizer_config.json", b"[1]", "holds a JSON list instead of an object"),
        ("tokenizer.model", b"", "is empty"),
    ],
)
def test_a_damaged_tokenizer_is_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    (problem,) = problems(folder)
    assert problem.message == f"model.path: {name} {message}"
    assert problem.where.startswith(str(folder / name))
    assert problem.remedy
    # This does not matter if another tokenizer is used.
    assert problems(folder, tokenizer="owner/name") == []
    (problem,) = file_problems(folder, key="model.tokenizer")
    assert problem.message == f"model.tokenizer: {name} {message}"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"is_encoder_decoder": True, "model_type": "t5"}, "this is an encoder-decoder model"),
        (
            {"vision_config": {"depth": 2}, "model_type": "qwen3_5"},
            "this model also takes images, video or sound (vision_config)",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantized (awq)"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "m.C"}}, "the model needs its own Python code (auto_map)"),
        ({"model_type": "mine"}, "does not know the architecture mine"),
        ({"model_type": "llava"}, "transformers has no causal language model for it"),
        ({"model_type": "clip"}, "transformers has no causal language model for it"),
        ({"vocab_size": None}, "the model's config.json lacks vocab_size"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_its_config(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (problem,) = problems(folder)
    assert message in problem.message
    assert problem.where == str(folder / "config.json")


def test_the_code_of_a_known_architecture_is_not_needed(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {"AutoConfig": "m.C"}}))
    assert problems(folder) == []


@pytest.mark.parametrize(
    "files, message",
    [
        (["adapter_config.json"], "the folder holds a LoRA adapter (adapter_config.json) and no model"),
        (["model.Q4_1.gguf"], "the folder holds GGUF files and no config.json"),
        (["model-1.safetensors", "model-2.safetensors"], "the folder has no config.json"),
    ],
)
def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    (problem,) = problems(tmp_path)
    assert problem.message == f"model.path: {message}"
    assert problem.remedy


def test_damaged_generation_settings_are_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    (problem,) = problems(folder, tokenizer="owner/name")
    assert problem.message.startswith("model.path: generation_config.json is not valid JSON")


def test_shards_without_their_index_are_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (problem,) = problems(folder)
    assert problem.message.startswith("model.path: model.safetensors.index.json is missing, which lists the contents of model-0")


def test_all_damaged_files_are_named_at_once(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}))
    for i in (0, 1):
        (folder / f"model-{i}.safetensors").write_bytes(POINTER)
    (folder / "model-2.safetensors").write_bytes(b"<!DOCTYPE html>")
    (folder / "model-3.safetensors").write_bytes(b"")
    cut = (folder / "model-4.safetensors").read_bytes()[:-1]
    (folder / "model-4.safetensors").write_bytes(cut)
    (folder / "model-5.safetensors").unlink()
    assert [problem.message.removeprefix("model.path: ") for problem in problems(folder)] == [
        "the weights are quantized (gptq), and quantized weights cannot be trained",
        "1 of the 6 files that the index names are not in the folder: model-5.safetensors",
        "2 of the 5 weight files are unusable: each is a Git LFS pointer instead of the file: model-0.safetensors, "
        "model-1.safetensors",
        "model-2.safetensors is an HTML page",
        "model-3.safetensors is empty",
        f"model-4.safetensors is incomplete: it has {len(cut)} bytes, and its header describes {len(cut) + 1}; the first tensor "
        "that is cut off is t4",
    ]
    assert problems(folder, init="random")[1:] == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not valid JSON"),
        (b"[]", "holds a JSON list"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": {"a": 1}}', "names no file for the tensor a"),
        (b'{"weight_map": {"a": "../b.safetensors"}}', "names no file for the tensor a"),
        (POINTER, "is a Git LFS pointer"),
    ],
)
def test_a_damaged_index_is_named(folder: Path, content: bytes, message: str) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    (problem,) = problems(folder)
    assert problem.message.startswith(f"model.path: model.safetensors.index.json {message}")
