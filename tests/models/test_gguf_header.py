"""Metadata of GGUF files, compared with the reference package."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter

from launcher.models import weight_files


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
