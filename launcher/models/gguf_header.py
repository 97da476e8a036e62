"""The metadata of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The gguf package's reader creates a NumPy array for each of the tokenizer's hundred thousand strings, which takes seconds.
Commands that plan a run need only a few numbers.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

# struct formats by GGUF type number; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_VERSIONS = (2, 3)


def model_config(file: Path) -> dict[str, Any]:
    """Return the architecture of the model, under the keys of a config.json.

    Raises:
        ValueError: if the file is not a GGUF file, or lacks one of the numbers.
    """
    fields = read(file)
    try:
        architecture = str(fields["general.architecture"])

        def number(name: str) -> int:
            return int(fields[f"{architecture}.{name}"])

        return {
            "model_type": architecture,
            "hidden_size": number("embedding_length"),
            "intermediate_size": number("feed_forward_length"),
            "num_hidden_layers": number("block_count"),
            "num_attention_heads": number("attention.head_count"),
            "num_key_value_heads": number("attention.head_count_kv"),
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "tie_word_embeddings": True,
        }
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]} in its metadata") from error


def read(file: Path) -> dict[str, Any]:
    """Read the metadata by key; strings in arrays stay bytes, because only the length of such an array is used.

    Raises:
        ValueError: if the file is not a GGUF file of a supported version, or is truncated.
    """
    try:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            magic, version, _, num_fields = struct.unpack_from("<4sIQQ", data)
            if magic != b"GGUF" or version not in _VERSIONS:
                raise ValueError("another kind of file")
            fields, offset = {}, struct.calcsize("<4sIQQ")
            for _ in range(num_fields):
                key, offset = _read_string(data, offset)
                (kind,) = struct.unpack_from("<I", data, offset)
                fields[key.decode()], offset = _read_value(data, offset + 4, kind)
            return fields
    except (struct.error, KeyError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is not a complete GGUF file of version 2 or 3") from error


def _read_value(data: mmap.mmap, offset: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        text, offset = _read_string(data, offset)
        return text.decode(), offset
    if kind != _ARRAY:
        layout = struct.Struct(f"<{_SCALARS[kind]}")
        return layout.unpack_from(data, offset)[0], offset + layout.size
    kind, count = struct.unpack_from("<IQ", data, offset)
    offset += struct.calcsize("<IQ")
    if kind in _SCALARS:
        layout = struct.Struct(f"<{count}{_SCALARS[kind]}")
        return [*layout.unpack_from(data, offset)], offset + layout.size
    values = []
    for _ in range(count):
        value, offset = _read_string(data, offset) if kind == _STRING else _read_value(data, offset, kind)
        values.append(value)
    return values, offset


def _read_string(data: mmap.mmap, offset: int) -> tuple[bytes, int]:
    (length,) = _LENGTH.unpack_from(data, offset)
    start = offset + _LENGTH.size
    return data[start : start + length], start + length
