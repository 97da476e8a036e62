"""Reads the headers of a model folder's weight files, and the stored result of comparing them with the model.

The comparison needs transformers and runs in `launcher.worker.checks.weight_check`. The cache stores its result under a digest of
everything that it depends on, so the submit side reads it without starting a process. The header format is documented at
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from launcher import atomic_files
from launcher.config.schema import ModelSection
from launcher.data import cache_dir
from launcher.errors import ConfigError, Problem
from launcher.security import ownership

# Increase this when the comparison changes, so that stored results are not used.
_FORMAT = 1
# In transformers' order of preference.
_SAFE_NAMES = ("model.safetensors", "model.safetensors.index.json")
_PICKLED_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_NUM_NAMED = 5
# The package safetensors refuses longer headers; a sparse file can have any size.
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 64
# The index of a model with a hundred thousand tensors has some 20 MB.
_MAX_JSON_BYTES = 100_000_000
# Number of bytes to recognize a file whose content does not match its name.
_NUM_HEAD_BYTES = 512
_DOWNLOAD = "download this file again"
_PLAIN = "correct the name, or use another model folder"
_JSON_TYPES = {list: "list", str: "string", int: "number", float: "number", bool: "value", type(None): "null"}
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file: its safetensors dtype, its shape, and its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int = field(default=0, compare=False)


@dataclass(frozen=True)
class ShapeMismatch:
    """A tensor whose shape in the files differs from the model's."""

    name: str
    in_files: tuple[int, ...]
    in_model: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} is {list(self.in_files)} in the files and {list(self.in_model)} in the model"


@dataclass(frozen=True)
class WeightReport:
    """The tensors in which the weight files and the model differ; `unexpected` ones are only in the files and are not loaded."""

    missing: tuple[str, ...] = ()
    mismatched: tuple[ShapeMismatch, ...] = ()
    unexpected: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> WeightReport:
        """Create a report from the values of `asdict`, as read from JSON."""
        mismatched = (ShapeMismatch(m["name"], tuple(m["in_files"]), tuple(m["in_model"])) for m in values["mismatched"])
        return cls(tuple(values["missing"]), tuple(mismatched), tuple(values["unexpected"]))

    def problems(self, folder: Path, model: ModelSection) -> list[Problem]:
        """Return why a run cannot start from these weights: transformers would initialize the rest randomly."""
        problems = []
        repair = _describe_repair(folder, model)
        if self.missing:
            message = f"the weight files lack {_number(self.missing)} of the model: {_first(self.missing)}"
            remedy = f"{repair}; model.init=random trains the whole model from random weights"
            problems.append(_problem(message, folder, remedy))
        if self.mismatched:
            message = (
                f"the weight files have {_number(self.mismatched)} in another shape than the model: {_first(self.mismatched)}"
            )
            problems.append(_problem(message, folder, f"use the config.json that belongs to these weights, or {repair}"))
        return problems

    @property
    def note(self) -> str | None:
        """Return one line about tensors in the files that the model does not have; None if there are none."""
        if not self.unexpected:
            return None
        number = _number(self.unexpected)
        return f"the model does not have {number} of the weight files; they are not loaded: {_first(self.unexpected)}"


def _number(items: Sequence[object]) -> str:
    return f"{len(items):,} tensor" if len(items) == 1 else f"{len(items):,} tensors"


def _first(items: Sequence[object]) -> str:
    separator = "; " if isinstance(items[0], ShapeMismatch) else ", "
    more = f" and {len(items) - _NUM_NAMED:,} more" if len(items) > _NUM_NAMED else ""
    return separator.join(map(str, items[:_NUM_NAMED])) + more


def _describe_repair(folder: Path, model: ModelSection) -> str:
    path = model.path or ""
    if path.startswith("package:"):
        return f"delete {folder} (it is converted again from {path})"
    if path.startswith("run:"):
        return f"delete {folder} (it is written again from the checkpoint) or choose another step (model.path=run:NAME@STEP)"
    if folder.parent.name == "snapshots":
        return f"delete {folder.parent.parent} (it is downloaded again) or choose another model.revision"
    return "download the model folder again"


def _problem(message: str, folder: Path, remedy: str) -> Problem:
    return Problem(f"model.path: {message}", where="model.path", value=str(folder), remedy=remedy)


def weight_files(folder: Path, with_pickled: bool) -> list[Path]:
    """Return the files that transformers loads from a folder, including missing shards; empty if there are none.

    Raises:
        ConfigError: if config.json or the index cannot be read.
    """
    chosen = read_json(folder / "config.json").get("transformers_weights")
    if isinstance(chosen, str) and not is_plain_name(chosen):
        raise ConfigError(_problem("transformers_weights in config.json names a file outside the folder", folder, _PLAIN))
    names = [chosen] if isinstance(chosen, str) else [*_SAFE_NAMES, *(_PICKLED_NAMES if with_pickled else ())]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        return []
    if not file.name.endswith(".index.json"):
        return [file]
    shards = read_json(file).get("weight_map")
    if not isinstance(shards, dict):
        raise ConfigError(_problem(f"{file.name} has no weight_map", folder, "download this file again"))
    if outside := next((name for name in shards.values() if not is_plain_name(str(name))), None):
        raise ConfigError(_problem(f"{file.name} names a file outside the folder: {outside}", folder, _PLAIN))
    return sorted({folder / str(name) for name in shards.values()})


def is_plain_name(name: str) -> bool:
    """Return whether a text names a file directly in a folder, not above or below it."""
    return bool(name) and name not in (".", "..") and "/" not in name and "\0" not in name


@dataclass(frozen=True)
class FileDamage:
    """The damage to a file's content, as the text after its name in a sentence, and the remedy."""

    reason: str
    remedy: str


class _DamagedFile(Exception):
    def __init__(self, damage: FileDamage) -> None:
        super().__init__(damage.reason)
        self.damage = damage


def find_damage(file: Path) -> FileDamage | None:
    """Return why a weight file cannot be read, judging by its header and size; None if nothing is found, or it is a pickle."""
    try:
        if file.suffix == ".safetensors":
            _header_or_damage(file)
            return None
        with open(file, "rb") as stream:
            return _foreign_content(stream.read(_NUM_HEAD_BYTES))
    except _DamagedFile as error:
        return error.damage
    except OSError as error:
        return FileDamage(f"cannot be read: {error.strerror}", "check its permissions and the disk")


def find_text_damage(file: Path) -> FileDamage | None:
    """Return why an unparsed file cannot be what its name says, judging by its first bytes and, for JSON, its last bytes."""
    try:
        with open(file, "rb") as stream:
            if damage := _foreign_content(stream.read(_NUM_HEAD_BYTES)):
                return damage
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _NUM_HEAD_BYTES))
            if file.suffix == ".json" and not stream.read().rstrip().endswith(b"}"):
                return FileDamage("is incomplete: it does not end with }", _DOWNLOAD)
    except OSError as error:
        return FileDamage(f"cannot be read: {error.strerror}", "check its permissions and the disk")
    return None


def _foreign_content(head: bytes) -> FileDamage | None:
    """Return what a file contains instead of its content, judging by its first bytes."""
    if not head.strip():
        return FileDamage("is empty", _DOWNLOAD)
    if head.startswith(b"version https://git-lfs"):
        return FileDamage("is a Git LFS pointer instead of the file", "run in its folder: git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return FileDamage("is an HTML page", f"{_DOWNLOAD}; addresses of files on the hub contain /resolve/ instead of /blob/")
    return None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: if the file holds something else, with the line and column.
    """
    where, remedy = str(file), "correct it, or download this file again"
    try:
        with open(file, "rb") as stream:
            raw = stream.read(min(_MAX_JSON_BYTES, os.fstat(stream.fileno()).st_size) + 1)
        if len(raw) > _MAX_JSON_BYTES:
            message = f"model.path: {file.name} is larger than {_MAX_JSON_BYTES // 10**6} MB, the limit for such a file"
            raise ConfigError(Problem(message, where, remedy=_DOWNLOAD))
        if damage := _foreign_content(raw[:_NUM_HEAD_BYTES]):
            raise ConfigError(Problem(f"model.path: {file.name} {damage.reason}", where, remedy=damage.remedy))
        content = json.loads(raw.decode("utf-8-sig"))
        if isinstance(content, dict):
            return content
        reason = f"holds a JSON {_JSON_TYPES.get(type(content), 'value')} instead of an object"
    except json.JSONDecodeError as error:
        where = f"{file}:{error.lineno}:{error.colno}"
        reason = f"is not valid JSON: {error.msg}"
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text: byte {error.start:,}"
    except ValueError:
        reason = "holds a number of too many digits"
    except RecursionError:
        reason = "is nested too deeply"
    except OSError as error:
        reason, remedy = f"cannot be read: {error.strerror}", "check its permissions and the disk"
    raise ConfigError(Problem(f"model.path: {file.name} {reason}", where, remedy=remedy))


def read_header(file: Path) -> Mapping[str, TensorHeader]:
    """Return the tensors of a safetensors file by name, without reading their data.

    Raises:
        ConfigError: if it is not a complete safetensors file.
    """
    return _header(file)[0]


def _header(file: Path) -> tuple[Mapping[str, TensorHeader], str]:
    try:
        return _header_or_damage(file)
    except _DamagedFile as error:
        raise ConfigError(_problem(f"{file.name} {error.damage.reason}", file, error.damage.remedy)) from error


def _header_or_damage(file: Path) -> tuple[Mapping[str, TensorHeader], str]:
    stat = file.stat()
    return _parse_header(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _parse_header(file: Path, num_bytes: int, _mtime_ns: int) -> tuple[Mapping[str, TensorHeader], str]:
    """Parse the header of a file of `num_bytes`; return its tensors and a digest of the header."""
    with open(file, "rb") as stream:
        head = stream.read(_NUM_HEAD_BYTES)
        if damage := _foreign_content(head):
            raise _DamagedFile(damage)
        length = int.from_bytes(head[:8], "little")
        if length > num_bytes - 8 and head[8:9] == b"{":
            reason = f"is incomplete: it has {num_bytes:,} bytes, and its header alone has {length:,}"
            raise _DamagedFile(FileDamage(reason, _DOWNLOAD))
        stream.seek(8)
        raw = stream.read(length) if 0 < length <= min(num_bytes - 8, _MAX_HEADER_BYTES) else b""
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {
            name: TensorHeader(entry["dtype"], tuple(entry["shape"]), 8 + length + int(entry["data_offsets"][0]))
            for name, entry in entries.items()
        }
        ends = {name: int(entry["data_offsets"][1]) for name, entry in entries.items()}
        misshapen = [name for name, entry in entries.items() if not _fits(tensors[name], *entry["data_offsets"])]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise _DamagedFile(FileDamage("is not a safetensors file", _DOWNLOAD)) from error
    if misshapen:
        reason = f"has a damaged header: the bytes of the tensor {misshapen[0]} do not fit its shape and type"
        raise _DamagedFile(FileDamage(reason, _DOWNLOAD))
    described = 8 + length + max(ends.values(), default=0)
    if described != num_bytes:
        cut = min((name for name in ends if 8 + length + ends[name] > num_bytes), key=ends.__getitem__, default=None)
        first = f"; the first tensor that is cut off is {cut}" if cut is not None else ""
        reason = f"is incomplete: it has {num_bytes:,} bytes, and its header describes {described:,}{first}"
        raise _DamagedFile(FileDamage(reason, _DOWNLOAD))
    return tensors, xxhash.xxh3_64_hexdigest(raw)


def _fits(tensor: TensorHeader, begin: int, end: int) -> bool:
    """Return whether a tensor's byte count matches its shape and type; types with other sizes are not checked."""
    # Multiplying many large numbers takes very long.
    if len(tensor.shape) > _MAX_DIMENSIONS or not all(0 <= size < 2**63 for size in tensor.shape):
        return False
    size, count = _DTYPE_BYTES.get(tensor.dtype), math.prod(tensor.shape)
    return 0 <= begin <= end and (size is None or end - begin == size * count)


def load_report(folder: Path, model: ModelSection) -> WeightReport | None:
    """Read the stored result of comparing the folder's weights with its model; None if they were not compared.

    Raises:
        ConfigError: if a weight file is damaged.
    """
    file = _report_file(folder, model)
    ownership.require_cache(file)
    try:
        return WeightReport.of(json.loads(file.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_report(folder: Path, model: ModelSection, report: WeightReport) -> None:
    """Store the result of a comparison.

    Raises:
        DataError: if the launcher's cache cannot be written.
    """
    file = _report_file(folder, model)
    with cache_dir.convert_os_errors(file.parent):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_files.write_json(file, asdict(report))


def _report_file(folder: Path, model: ModelSection) -> Path:
    """Return the file of the result, named by a digest of the content that it depends on, not by the folder's path."""
    described = [folder / "config.json", *sorted(folder.glob("*.index.json"))]
    if model.trust_remote_code:
        described += sorted(folder.glob("*.py"))
    key = [
        _FORMAT,
        importlib.metadata.version("transformers"),
        model.trust_remote_code,
        [[file.name, xxhash.xxh3_64_hexdigest(file.read_bytes())] for file in described],
        [[file.name, _content_key(file)] for file in weight_files(folder, model.allow_pickled_weights)],
    ]
    return cache_dir.cache_root() / "weight-checks" / f"{xxhash.xxh3_128_hexdigest(json.dumps(key).encode())}.json"


def _content_key(file: Path) -> str:
    """Return a text that changes with the content of the file."""
    if file.suffix == ".safetensors":
        return _header(file)[1]
    # A pickle cannot be read without loading it.
    stat = file.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"
