"""Checks the files of a local model folder before anything starts: config.json, the index and the weight files, all at once.

Does not import torch.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.checkpoint.folder_links import link_problems
from launcher.config.schema import ModelSection
from launcher.errors import ConfigError, Problem
from launcher.models import weight_files
from launcher.models.remote_code import adapter_problems, code_problems
from launcher.plan.architecture.facts import model_facts
from launcher.plan.architecture.problems import config_problems
from launcher.plan.quantities import format_size

_NUM_NAMED = 3
# transformers reads such files completely, and uses several times their size. The largest tokenizers have some 50 MB.
_READ_WHOLE = (".json", ".jinja", ".txt", ".model")
_MAX_READ_BYTES = 512 << 20
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*.model")
_MAX_PARSED_BYTES = 1 << 20
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def folder_problems(folder: Path, model: ModelSection) -> list[Problem]:
    """Return all problems with the files of a model folder, without reading the data of tensors."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        return [_without_config(folder)]
    problems: list[Problem] = [*link_problems(folder), *adapter_problems(folder), *size_problems(folder)]
    problems += file_problems(folder, ("generation_config.json",))
    if model.tokenizer is None:
        problems += file_problems(folder)
    try:
        config = weight_files.read_json(config_file)
        problems += _config_problems(config, config_file, model)
        problems += code_problems(model, config, folder, str(config_file))
    except ConfigError as error:
        problems += error.problems
    if model.init != "random":
        problems += _weight_problems(folder, model)
    # A damaged config.json is found twice.
    return list(dict.fromkeys(problems))


def _without_config(folder: Path) -> Problem:
    message, remedy = "model.path: the folder has no config.json", "use a Hugging Face model folder"
    inner = sorted(file.parent for file in folder.glob("*/config.json"))
    if (folder / "adapter_config.json").is_file():
        message = "model.path: the folder holds a LoRA adapter (adapter_config.json) and no model"
        remedy = "merge the adapter into its base model first (merge_and_unload of PEFT), and use the merged model's folder"
    elif any(folder.glob("*.gguf")):
        message, remedy = "model.path: the folder holds GGUF files and no config.json", "use the model's folder with safetensors"
    elif inner:
        remedy = f"did you mean {' or '.join(map(str, inner[:_NUM_NAMED]))}?"
    return _problem(message, folder, remedy)


def size_problems(folder: Path, key: str = "model.path") -> list[Problem]:
    """Return which files of a folder, such as tokenizer.json, are too large to be read: a sparse file can have any size."""
    large = [
        (file, size)
        for file in sorted(folder.iterdir())
        if file.suffix in _READ_WHOLE and file.is_file() and (size := file.stat().st_size) > _MAX_READ_BYTES
    ]
    return [
        Problem(
            f"{key}: {file.name} is larger than {_MAX_READ_BYTES >> 20} MiB, the limit for such a file",
            where=str(file),
            value=format_size(size),
            remedy="download this file again, or remove it if it does not belong to the model",
        )
        for file, size in large
    ]


def file_problems(folder: Path, patterns: Sequence[str] = TOKENIZER_FILES, key: str = "model.path") -> list[Problem]:
    """Return which files of a tokenizer have foreign content, or end too early; large files are not parsed."""
    problems = []
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        try:
            if file.stat().st_size > _MAX_PARSED_BYTES or file.suffix != ".json":
                damage = weight_files.find_text_damage(file)
            else:
                damage = None
                weight_files.read_json(file)
        except ConfigError as error:
            # The message begins with the setting.
            problems += [replace(one, message=f"{key}: {one.message.removeprefix('model.path: ')}") for one in error.problems]
            continue
        if damage is not None:
            problems.append(Problem(f"{key}: {file.name} {damage.reason}", str(file), remedy=damage.remedy))
    return problems


def _config_problems(config: Mapping[str, Any], file: Path, model: ModelSection) -> list[Problem]:
    if not config.get("model_type"):
        remedy = "use the config.json of the model; transformers chooses the architecture by this key"
        return [Problem("model.path: config.json has no model_type", str(file), remedy=remedy)]
    problems = list(config_problems(config, str(file)))
    if not model.trust_remote_code:
        problems += _code_problems(config, file)
    # The other problems explain why numbers are missing.
    if not problems:
        try:
            model_facts(dict(config), str(file), None, None)
        except ConfigError as error:
            problems += error.problems
    return problems


def _code_problems(config: Mapping[str, Any], file: Path) -> Iterator[Problem]:
    """Yield why transformers cannot build this architecture without code that comes with the model."""
    model_type, known, causal = str(config["model_type"]), _known_types(), _causal_types()
    if known is None or f'"{model_type}"' in known:
        is_named = bool(config.get("is_encoder_decoder")) or isinstance(config.get("auto_map"), dict)
        if causal and model_type not in causal and not is_named:
            message = "model.path: this architecture predicts no next token: transformers has no causal language model for it"
            yield Problem(message, str(file), model_type, "choose a text-only language model")
        return
    if isinstance(config.get("auto_map"), dict):
        message = f"model.path: the model needs its own Python code (auto_map), because transformers does not know {model_type}"
        remedy = (
            "read that code; then set model.trust_remote_code=true, with model.revision at a 40-digit commit or, for a folder, "
            "model.code_digest; or choose a model that transformers knows"
        )
    else:
        version = importlib.metadata.version("transformers")
        message = f"model.path: transformers {version} does not know the architecture {model_type}"
        remedy = "check model_type in config.json, or install a version of transformers that knows it"
    yield Problem(message, str(file), model_type, remedy)


def _known_types() -> str | None:
    """Return the source text that lists the architectures of the installed transformers; None if not found."""
    return _source("auto_mappings.py")


def _causal_types() -> frozenset[str]:
    """Return the architectures for which the installed transformers has a causal language model; empty if it does not say."""
    listed = re.search(
        r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = (.*?)^\)", _source("modeling_auto.py") or "", re.MULTILINE | re.DOTALL
    )
    return frozenset(re.findall(r'\("([\w.-]+)", ?"', listed[1])) if listed is not None else frozenset()


def _source(name: str) -> str | None:
    try:
        file = importlib.metadata.distribution("transformers").locate_file(f"transformers/models/auto/{name}")
        return Path(str(file)).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def _weight_problems(folder: Path, model: ModelSection) -> list[Problem]:
    index_problems = [problem for name in _INDEXES if (folder / name).is_file() for problem in _index_problems(folder / name)]
    if index_problems:
        return index_problems
    problems: list[Problem] = []
    try:
        files = weight_files.weight_files(folder, model.allow_pickled_weights)
    except ConfigError as error:
        problems += error.problems
        # The names of the files that it lists are unknown.
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        return problems or [_without_weights(folder, model)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        message = (
            f"model.path: {len(missing)} of the {len(files)} files that the index names are not in the folder: {_names(missing)}"
        )
        problems.append(_problem(message, folder, "download the missing files again"))
    return [*problems, *_damaged_files(folder, [file for file in files if file.is_file()])]


def _index_problems(index: Path) -> Iterator[Problem]:
    try:
        shards = weight_files.read_json(index).get("weight_map")
    except ConfigError as error:
        yield from error.problems
        return
    if not isinstance(shards, dict) or not shards:
        yield _problem(f"model.path: {index.name} has no weight_map", index, "download this file again")
        return
    for tensor, name in shards.items():
        if not isinstance(name, str) or not weight_files.is_plain_name(name):
            yield _problem(f"model.path: {index.name} names no file for the tensor {tensor}", index, "download this file again")
            return


def _damaged_files(folder: Path, files: list[Path]) -> Iterator[Problem]:
    """Yield one problem per group of files that are damaged in the same way."""
    by_damage: dict[weight_files.FileDamage, list[str]] = {}
    for file in files:
        damage = weight_files.find_damage(file)
        if damage is not None:
            by_damage.setdefault(damage, []).append(file.name)
    for damage, names in by_damage.items():
        if len(names) == 1:
            yield _problem(f"model.path: {names[0]} {damage.reason}", folder / names[0], damage.remedy)
        else:
            message = (
                f"model.path: {len(names)} of the {len(files)} weight files are unusable: each {damage.reason}: {_names(names)}"
            )
            yield _problem(message, folder, damage.remedy)


def _without_weights(folder: Path, model: ModelSection) -> Problem:
    if any(folder.glob("pytorch_model*.bin")) and not model.allow_pickled_weights:
        remedy = "convert them to safetensors, or set model.allow_pickled_weights=true if you trust their source"
        return _problem("model.path: the weights are pickled (.bin); loading a pickle can run code", folder, remedy)
    if shards := sorted(folder.glob("*.safetensors")):
        names = _names([file.name for file in shards])
        message = f"model.path: model.safetensors.index.json is missing, which lists the contents of {names}"
        return _problem(message, folder, "download this file again; if the weights are one file, rename it to model.safetensors")
    remedy = "use a folder with model.safetensors, or its shards and their index, or set model.init=random"
    return _problem("model.path: the folder holds no weights", folder, remedy)


def _names(names: list[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")


def _problem(message: str, path: Path, remedy: str) -> Problem:
    return Problem(message, "model.path", str(path), remedy)
