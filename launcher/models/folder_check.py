"""Checks the files of a local model folder before anything starts: config.json, the index and the weight files, all at once.

Does not import torch.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.checkpoint.folder_links import link_problems
from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError, Problem
from launcher.models import weight_files
from launcher.models.remote_code import adapter_problems, code_problems
from launcher.plan.architecture.facts import model_facts
from launcher.plan.architecture.problems import config_problems

_NUM_NAMED = 3
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*.model")


def folder_problems(folder: Path, model: ModelSection) -> list[Problem]:
    """Return all problems with the files of a model folder, without reading the data of tensors."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        message, remedy = "model.path: the folder has no config.json", "use a Hugging Face model folder"
        if inner := sorted(file.parent for file in folder.glob("*/config.json")):
            remedy = f"did you mean {' or '.join(map(str, inner[:_NUM_NAMED]))}?"
        return [_problem(message, folder, remedy)]
    problems = [*link_problems(folder), *adapter_problems(folder)]
    if problems:
        # A link may lead to a pipe or a device, which must not be read.
        return problems
    problems += file_problems(folder) if model.tokenizer is None else ()
    try:
        config = weight_files.read_json(config_file)
        problems += _config_problems(config, config_file, model)
        problems += code_problems(model, folder)
        problems += _weight_problems(folder, model) if model.init != "random" else ()
    except ConfigError as error:
        problems += error.problems
    return problems


def file_problems(folder: Path, patterns: Sequence[str] = TOKENIZER_FILES, key: str = "model.path") -> list[Problem]:
    """Return which files of a tokenizer are not what their names say, judging by their first bytes."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return [problem for file in files if (problem := weight_files.file_problem(file, key)) is not None]


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
    model_type = str(config["model_type"])
    package = importlib.metadata.distribution("transformers")
    listing = Path(str(package.locate_file("transformers/models/auto/auto_mappings.py")))
    if not listing.is_file() or f'"{model_type}"' in listing.read_text(encoding="utf-8"):
        return
    message = f"model.path: transformers {package.version} does not know the architecture {model_type}"
    remedy = "check model_type in config.json, or install a version of transformers that knows it"
    if isinstance(config.get("auto_map"), dict):
        message = f"model.path: the model needs its own Python code (auto_map), because transformers does not know {model_type}"
        remedy = (
            "read that code; then set model.trust_remote_code=true, with model.revision at a 40-digit commit or, for a folder, "
            "model.code_digest; or choose a model that transformers knows"
        )
    yield Problem(message, str(file), model_type, remedy)


def _weight_problems(folder: Path, model: ModelSection) -> Iterator[Problem]:
    """Yield why the weights cannot be loaded. Raises ConfigError if the index cannot be read."""
    files = weight_files.weight_files(folder, model.allow_pickled_weights)
    if not files and any(folder.glob("pytorch_model*.bin")) and not model.allow_pickled_weights:
        remedy = "convert them to safetensors, or set model.allow_pickled_weights=true if you trust their source"
        yield _problem("model.path: the weights are pickled (.bin); loading a pickle can run code", folder, remedy)
    elif not files:
        remedy = "use a folder with model.safetensors, or its shards and their index, or set model.init=random"
        yield _problem("model.path: the folder holds no weights", folder, remedy)
    if missing := [file.name for file in files if not file.is_file()]:
        message = f"model.path: {len(missing)} of the {len(files)} files that the index names are not in the folder: "
        yield _problem(message + _names(missing), folder, "download the missing files again")
    damaged = [(file, one) for file in files if file.is_file() and (one := weight_files.file_problem(file)) is not None]
    yield from (problem for _, problem in damaged[:_NUM_NAMED])
    if more := [file.name for file, _ in damaged[_NUM_NAMED:]]:
        yield _problem(f"model.path: {len(more)} more weight files are unusable: {_names(more)}", folder, "download them again")


def _names(names: list[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")


def _problem(message: str, path: Path, remedy: str) -> Problem:
    return Problem(message, "model.path", str(path), remedy)
