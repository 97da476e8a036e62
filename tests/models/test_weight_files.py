"""Reading weight files without torch: their headers, which files count, the cached comparison, and metadata of GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import save_file

from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError
from launcher.models import weight_files
from launcher.models.found_model import find_model
from launcher.models.weight_files import WeightReport

REPORT = WeightReport(("a", "b"), ("c is [1, 2] in the files and [2, 1] in the model",), ("d",))


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))


def model_folder(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors or {"a": torch.zeros(2, 3)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html>", "HTML page"),
        (b"\xff\x00\0\0\0\0\0\0{", "not a complete safetensors file"),
        (b"\x03\0\0\0\0\0\0\0[1]", "not a complete safetensors file"),
        (b"\0\0\0\0\0\xff\0\0{" + b" " * 99, "not a complete safetensors file"),
        (b"pickled" + b"\xff" * 99, "not a complete safetensors file"),
        (None, "not a complete safetensors file"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, content: bytes | None, reason: str) -> None:
    folder = model_folder(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ConfigError, match=reason) as error:
        weight_files.load_report(folder, ModelSection(path=str(folder)))
    assert error.value.problems[0].value == str(file)


def test_files_are_those_that_transformers_loads(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "consolidated.safetensors").write_bytes(b"another form of the same weights")
    (folder / "pytorch_model.bin").touch()
    index = {"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, expected in {
        "model.safetensors": ["model.safetensors"],
        "model.safetensors.index.json": ["1.safetensors", "2.safetensors"],
        "pytorch_model.bin": ["pytorch_model.bin"],
    }.items():
        assert [file.name for file in weight_files.weight_files(folder, with_pickled=True)] == expected
        (folder / name).unlink()
    assert weight_files.weight_files(folder, with_pickled=True) == []


def test_a_stored_weight_report_is_found_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = model_folder(tmp_path / "first"), model_folder(tmp_path / "second")
    model = ModelSection(path=str(first))
    assert weight_files.load_report(first, model) is None
    weight_files.save_report(first, model, REPORT)
    assert weight_files.load_report(second, ModelSection(path=str(second))) == REPORT
    save_file({"a": torch.ones(2, 3)}, second / "model.safetensors")
    assert weight_files.load_report(second, model) == REPORT, "values are not compared"
    save_file({"a": torch.zeros(3, 2)}, second / "model.safetensors")
    assert weight_files.load_report(second, model) is None
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda package: "another")
        assert weight_files.load_report(first, model) is None
    (first / "config.json").write_text("{}")
    assert weight_files.load_report(first, model) is None


def test_a_refusal_names_what_is_downloaded_again() -> None:
    snapshot = Path("/hub/models--owner--name/snapshots/0123")
    assert "delete /hub/models--owner--name," in REPORT.problems(snapshot, ModelSection(path="owner/name"))[0].remedy


def test_the_submit_side_reads_the_stored_weight_report(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    sizes = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 4}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    model = ModelSection(path=str(folder))
    assert find_model(model).weight_report is None
    weight_files.save_report(folder, model, REPORT)
    assert find_model(model).weight_report == REPORT
    assert "they are not loaded: d" in str(find_model(model).weights_note)
    assert find_model(model.model_copy(update={"init": "random"})).weight_report == WeightReport()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    for kind, value in (("uint8", 1), ("int16", -2), ("uint32", 3), ("uint64", 2**40), ("float32", 0.5), ("float64", 0.25)):
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_bool("a.bool", True)
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.scores", [0.5, -1.5])
    writer.add_token_list(["a", "b", "\u0120longer token"])
    writer.add_string("a.string", "with \u00e4 in it")
    writer.add_embedding_length(576)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_every_type_of_value_is_read_as_the_package_reads_it(file: Path) -> None:
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items() if not name.startswith("GGUF.")}
    read = weight_files.read_gguf(file)
    assert read.pop("tokenizer.ggml.tokens") == [token.encode() for token in fields.pop("tokenizer.ggml.tokens")]
    assert read == fields
    assert (read["llama.embedding_length"], read["general.architecture"]) == (576, "llama")


def test_a_missing_number_is_reported(file: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.gguf has no llama\.feed_forward_length in its metadata"):
        weight_files.read_gguf_config(file)


def long_array(data: bytes) -> bytes:
    """Set the length of the first array of numbers to more than any memory can hold."""
    at = data.index(b"a.numbers") + len("a.numbers") + 8
    return data[:at] + (2**62).to_bytes(8, "little") + data[at + 8 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:60],
        lambda data: b"GGML" + data[4:],
        lambda data: b"",
        lambda data: data[:24] + b"\xff" * 8 + data[32:],
        long_array,
    ],
)
def test_a_damaged_file_is_refused(file: Path, damage) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=str(file)):
        weight_files.read_gguf(file)
