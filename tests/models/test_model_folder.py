"""Damaged and unsuitable model folders: each fault is reported with its file, and all faults at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.config.sections.model import ModelSection
from launcher.errors import Problem
from launcher.models.found_model import file_problems, folder_problems

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
