"""Reads the headers of weight files, and the stored result of comparing those of a folder with the model.

The header of safetensors files is documented at https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError, Problem
from launcher.models import stored_checks
from launcher.plan.quantities import format_count, list_first

# Increase this when the comparison changes, so that stored results are not used.
_FORMAT = 2
# In transformers' order of preference.
_SAFE_NAMES = ("model.safetensors", "model.safetensors.index.json")
_PICKLED_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_NUM_NAMED = 5
# Number of bytes to recognize a file whose content does not match its name.
_NUM_HEAD_BYTES = 512
_DOWNLOAD = "download this file again"
# struct formats by GGUF type number; 8 is a string and 9 an array.
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_LENGTH = struct.Struct("<Q")
_GGUF_VERSIONS = (2, 3)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file: its safetensors dtype, its shape, and its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int = field(default=0, compare=False)


@dataclass(frozen=True)
class WeightReport:
    """The tensors in which the weight files and the model differ: those that the files lack, those of another shape, each with
    both shapes, and those that are only in the files and are not loaded."""

    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def problems(self, folder: Path, model: ModelSection) -> list[Problem]:
        """Return why a run cannot start from these weights: transformers would initialize the rest randomly."""
        problems, path = [], model.path or ""
        repair = "download the model folder again"
        if path.startswith(("package:", "run:")):
            repair = f"delete {folder}, which is written again from {path}"
        elif folder.parent.name == "snapshots":
            repair = f"delete {folder.parent.parent}, which is downloaded again, or choose another model.revision"
        if self.missing:
            message = f"the weight files lack {_describe_tensors(self.missing, 'of the model')}"
            remedy = f"{repair}; model.init=random trains the whole model from random weights"
            problems.append(make_path_problem(message, folder, remedy))
        if self.mismatched:
            message = f"the weight files have {_describe_tensors(self.mismatched, 'in another shape than the model')}"
            problems.append(make_path_problem(message, folder, f"use the config.json that belongs to these weights, or {repair}"))
        return problems

    @property
    def note(self) -> str | None:
        """Return one line about tensors in the files that the model does not have; None if there are none."""
        if not self.unexpected:
            return None
        tensors = _describe_tensors(self.unexpected, "of the weight files; they are not loaded")
        return f"the model does not have {tensors}"


def _describe_tensors(names: Sequence[str], role: str) -> str:
    return f"{format_count(len(names), 'tensor')} {role}: {list_first(names, _NUM_NAMED)}"


def make_path_problem(message: str, path: Path, remedy: str) -> Problem:
    """Return a problem with a file or folder of model.path."""
    return Problem(f"model.path: {message}", where="model.path", value=str(path), remedy=remedy)


def weight_files(folder: Path, with_pickled: bool) -> list[Path]:
    """Return the files that transformers loads from a folder, including missing shards. Raises ConfigError for a bad index."""
    chosen = read_json(folder / "config.json").get("transformers_weights")
    names = [chosen] if isinstance(chosen, str) else [*_SAFE_NAMES, *(_PICKLED_NAMES if with_pickled else ())]
    file = next((folder / name for name in names if is_plain_name(name) and (folder / name).is_file()), None)
    if isinstance(chosen, str) and not is_plain_name(chosen):
        message = "transformers_weights in config.json names a file outside the folder"
        raise ConfigError(make_path_problem(message, folder, "use another model folder"))
    if file is None:
        return []
    if not file.name.endswith(".index.json"):
        return [file]
    shards = read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(is_plain_name(name) for name in shards.values()):
        message = f"the weight_map of {file.name} does not name a file of this folder for each tensor"
        raise ConfigError(make_path_problem(message, file, _DOWNLOAD))
    return sorted({folder / name for name in shards.values()})


def is_plain_name(name: object) -> bool:
    """Return whether a value names a file directly in a folder, not above or below it."""
    return isinstance(name, str) and bool(name) and name not in (".", "..") and "/" not in name and "\0" not in name


def file_problem(file: Path, key: str = "model.path") -> Problem | None:
    """Return why a file is not what its name says, by its header or first bytes, as after an interrupted download; else None."""
    try:
        if file.suffix == ".safetensors":
            read_header(file)
        else:
            with open(file, "rb") as stream:
                _require_content(file, stream.read(_NUM_HEAD_BYTES))
    except ConfigError as error:
        problem = error.problems[0]
        return Problem(problem.message.replace("model.path", key, 1), problem.where, problem.value, problem.remedy)
    except OSError as error:
        return Problem(
            f"{key}: {file.name} cannot be read: {error.strerror}", str(file), remedy="check its permissions and the disk"
        )
    return None


def _require_content(file: Path, head: bytes) -> None:
    """Raise ConfigError if a file has other content than its name says, judging by its first bytes."""
    reason = remedy = ""
    if not head.strip():
        reason, remedy = "is empty", _DOWNLOAD
    elif head.startswith(b"version https://git-lfs"):
        reason, remedy = "is a Git LFS pointer instead of the file", "run in its folder: git lfs pull"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        reason, remedy = "is an HTML page", f"{_DOWNLOAD}; addresses on the hub contain /resolve/ instead of /blob/"
    if reason:
        raise ConfigError(make_path_problem(f"{file.name} {reason}", file, remedy))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError if the file holds something else, with the line and column."""
    where, reason = str(file), "does not hold a JSON object"
    try:
        raw = file.read_bytes()
        _require_content(file, raw[:_NUM_HEAD_BYTES])
        content = json.loads(raw.decode("utf-8-sig"))
        if isinstance(content, dict):
            return content
    except json.JSONDecodeError as error:
        where, reason = f"{file}:{error.lineno}:{error.colno}", f"is not valid JSON: {error.msg}"
    except (ValueError, RecursionError, OSError) as error:
        reason = f"cannot be read: {error}"
    raise ConfigError(Problem(f"model.path: {file.name} {reason}", where, remedy="correct it, or download this file again"))


def read_header(file: Path) -> Mapping[str, TensorHeader]:
    """Return the tensors of a safetensors file by name, without reading their data. Raises ConfigError if it is incomplete."""
    return _read_header(file)[0]


def _read_header(file: Path) -> tuple[Mapping[str, TensorHeader], str]:
    stat = file.stat()
    return _parse_header(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _parse_header(file: Path, num_bytes: int, _mtime_ns: int) -> tuple[Mapping[str, TensorHeader], str]:
    """Parse the header of a file of `num_bytes`; return its tensors and a digest of the header."""
    with open(file, "rb") as stream:
        _require_content(file, stream.read(_NUM_HEAD_BYTES))
        try:
            # Also compares the file's size with what its header describes.
            with safe_open(file, framework="np"):
                pass
        except SafetensorError as error:
            message = f"{file.name} is not a complete safetensors file: {error} ({num_bytes:,} bytes)"
            raise ConfigError(make_path_problem(message, file, _DOWNLOAD)) from error
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        raw = stream.read(length)
    entries = json.loads(raw)
    entries.pop("__metadata__", None)
    tensors = {
        name: TensorHeader(one["dtype"], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
        for name, one in entries.items()
    }
    return tensors, xxhash.xxh3_64_hexdigest(raw)


def count_parameters(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Count the parameters in the safetensors files from their headers; None if there are no such files.

    Tensors that transformers does not load are not counted: a tied head that is stored in addition to the embeddings, as in the
    files of Qwen3 0.6B, and layers after the last one, which predict further tokens in DeepSeek-V3 and GLM-4.5.
    """
    files = [file for file in weight_files(folder, with_pickled=False) if file.suffix == ".safetensors"]
    shapes = {name: tensor.shape for file in files for name, tensor in read_header(file).items()}
    num_layers = config.get("num_hidden_layers")
    if isinstance(num_layers, int):
        shapes = {name: s for name, s in shapes.items() if not (match := _LAYER.search(name)) or int(match[1]) < num_layers}
    if config.get("tie_word_embeddings"):
        embeddings = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
        shapes = {name: s for name, s in shapes.items() if not (name.endswith("lm_head.weight") and s in embeddings)}
    return sum(math.prod(shape) for shape in shapes.values()) or None


def load_report(folder: Path, model: ModelSection) -> WeightReport | None:
    """Read the stored comparison of the folder's weights with its model; None if there is none. Raises ConfigError."""
    values = stored_checks.load("weight-checks", _make_key(folder, model))
    return None if values is None else WeightReport(**{name: tuple(tensors) for name, tensors in values.items()})


def save_report(folder: Path, model: ModelSection, report: WeightReport) -> None:
    """Store the result of a comparison. Raises DataError if the launcher's cache cannot be written."""
    stored_checks.save("weight-checks", _make_key(folder, model), asdict(report))


def _make_key(folder: Path, model: ModelSection) -> list[Any]:
    """Return the content that a comparison depends on, without the folder's path."""
    contents = []
    for file in weight_files(folder, model.allow_pickled_weights):
        stat = file.stat()
        # A pickle cannot be read without loading it.
        is_safe = file.suffix == ".safetensors"
        contents.append([file.name, _read_header(file)[1] if is_safe else f"{stat.st_size}-{stat.st_mtime_ns}"])
    described = [folder / "config.json", *sorted(folder.glob("*.index.json"))]
    if model.trust_remote_code:
        described += sorted(folder.glob("*.py"))
    return [
        _FORMAT,
        importlib.metadata.version("transformers"),
        model.trust_remote_code,
        [[file.name, xxhash.xxh3_64_hexdigest(file.read_bytes())] for file in described],
        contents,
    ]


# GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The gguf package's reader creates a NumPy array for each
# of the tokenizer's hundred thousand strings, which takes seconds; commands that plan a run need only a few numbers.


def read_gguf_config(file: Path) -> dict[str, Any]:
    """Return the architecture of the model, under the keys of a config.json. Raises ValueError if the file lacks a number."""
    fields = read_gguf(file)
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


def read_gguf(file: Path) -> dict[str, Any]:
    """Read the metadata by key; strings in arrays stay bytes, because only their number is used. Raises ValueError."""
    try:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            magic, version, _, num_fields = struct.unpack_from("<4sIQQ", data)
            if magic != b"GGUF" or version not in _GGUF_VERSIONS:
                raise ValueError("another kind of file")
            fields, offset = {}, struct.calcsize("<4sIQQ")
            for _ in range(num_fields):
                key, offset = _read_gguf_string(data, offset)
                (kind,) = struct.unpack_from("<I", data, offset)
                fields[key.decode()], offset = _read_gguf_value(data, offset + 4, kind)
            return fields
    except (struct.error, KeyError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is not a complete GGUF file of version 2 or 3") from error


def _read_gguf_value(data: mmap.mmap, offset: int, kind: int) -> tuple[Any, int]:
    if kind == _GGUF_STRING:
        text, offset = _read_gguf_string(data, offset)
        return text.decode(), offset
    if kind != _GGUF_ARRAY:
        layout = struct.Struct(f"<{_GGUF_SCALARS[kind]}")
        return layout.unpack_from(data, offset)[0], offset + layout.size
    kind, count = struct.unpack_from("<IQ", data, offset)
    offset += struct.calcsize("<IQ")
    if kind in _GGUF_SCALARS:
        layout = struct.Struct(f"<{count}{_GGUF_SCALARS[kind]}")
        return [*layout.unpack_from(data, offset)], offset + layout.size
    values = []
    for _ in range(count):
        value, offset = _read_gguf_string(data, offset) if kind == _GGUF_STRING else _read_gguf_value(data, offset, kind)
        values.append(value)
    return values, offset


def _read_gguf_string(data: mmap.mmap, offset: int) -> tuple[bytes, int]:
    (length,) = _GGUF_LENGTH.unpack_from(data, offset)
    start = offset + _GGUF_LENGTH.size
    return data[start : start + length], start + length
