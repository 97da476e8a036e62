"""Python code that comes with a model: which of it transformers may run, and how it is pinned.

transformers runs the classes that `auto_map` in config.json names. It loads `owner/name--module.Class` from another repository,
at its newest commit. A Hub model is pinned by its commit, a folder by a digest of its code (`model.code_digest`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.schema import ModelSection, is_local_path, is_run
from launcher.errors import Problem
from launcher.security.owners import folder_problem

_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
ADAPTER = "adapter_config.json"
# Keys in config.json for names of implementations. A repository name (owner/name) is downloaded from the Hub and imported.
_IMPLEMENTATION = re.compile(r"\w*_implementation(?:_internal)?")
_MAX_SHOWN = 200
# transformers makes an attribute of every key: this one maps names of keys to others, and __dict__
# replaces all others. A number that JSON lacks is written as {"__float__": "NaN"}.
_OTHER_NAMES, _FLOAT = "attribute_map", "__float__"
_INTERNAL = re.compile(r"__.*__", re.DOTALL)
# Keys of config.json with which transformers finds classes of a model that it does not load from a folder.
_NAMES_CODE = frozenset({"auto_map", "name_or_path", "_name_or_path"})
# Implementations of experts that transformers downloads from the Hub although they name no repository.
_EXPERTS_OF_HUB = frozenset({"deepgemm", "deepgemm_megamoe", "sonicmoe"})


def code_digest(folder: Path) -> str | None:
    """Return the SHA-256 of the names and contents of all Python files below a folder; None if there are none."""
    files = sorted((str(path.relative_to(folder)), path) for path in python_files(folder))
    digest = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest() if files else None


def code_problems(model: ModelSection, config: Mapping[str, Any], folder: Path | None, where: str) -> Iterator[Problem]:
    """Yield why the code of a model may not run. `config` is its config.json, and `where` names that file for the user.

    `folder` is None if the model is not on this machine yet.
    """
    yield from hidden_code_problems(config, where)
    if not model.trust_remote_code:
        return
    yield from foreign_classes(config, where)
    if folder is not None and (model.code_digest is not None or is_local_path(model.path or "") or is_run(model.path)):
        yield from digest_problems(folder, model.code_digest, folder)
    elif folder is not None and (problem := owner_problem(folder)) is not None:
        yield problem


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json from which transformers builds a model without a folder: its own classes alone.

    It would take the classes of `auto_map` from the folder or repository that `name_or_path` names, at its newest commit.
    """
    return {key: value for key, value in config.items() if key not in _NAMES_CODE}


def owner_problem(folder: Path) -> Problem | None:
    """Return why other users could have changed the code in a model's folder, such as a snapshot of a commit; else None."""
    problem = folder_problem("the code of the model", folder)
    own = "set HF_HOME to a folder of your own, and download the model again"
    return problem and replace(problem, remedy=f"{own}; or {problem.remedy}")


def python_files(folder: Path) -> list[Path]:
    """Return all Python files below a folder, without following links to folders."""
    return sorted(path for path in folder.rglob("*.py") if path.is_file())


def adapter_problems(folder: Path) -> Iterator[Problem]:
    """Yield a problem if transformers would instead load an adapter's base model, which may be any repository."""
    if (folder / ADAPTER).is_file() and importlib.util.find_spec("peft") is not None:
        yield Problem(
            f"model.path: {ADAPTER} makes transformers load an adapter and another model, which it names",
            where=str(folder / ADAPTER),
            remedy="merge the adapter into its model and use that folder; if this is the whole model, delete the file",
        )


def digest_problems(folder: Path, digest: str | None, shown: Path) -> Iterator[Problem]:
    """Yield a problem if the Python files of a folder do not have the digest; it names the folder as `shown`."""
    actual = code_digest(folder)
    if actual == digest:
        return
    if actual is None:
        message, remedy = "the folder has no Python code", "remove model.code_digest and model.trust_remote_code"
    elif digest is None:
        message = "the code in the folder is not pinned: anyone who can write there chooses what runs"
        remedy = f"read the *.py files; if you trust them, set model.code_digest={actual}"
    else:
        message = "the code in the folder differs from the code that model.code_digest pins"
        remedy = f"find out who changed it; if you trust the files as they are, set model.code_digest={actual}"
    yield Problem(f"model.path: {message}", where=str(shown), value=digest or "", remedy=remedy)


def foreign_classes(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Yield a problem for each class in config.json that comes from outside the model; `where` names that file."""
    for name in _auto_map_classes(config):
        if _CLASS.fullmatch(name):
            continue
        message = "auto_map names code outside the model"
        if "--" in name:
            message = "auto_map takes code from another repository, at that repository's newest commit"
        remedy = "copy that code into a folder with the model, read it, and write module.Class in auto_map"
        yield Problem(f"model.path: {message}", where=where, value=name, remedy=remedy)


def hidden_code_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Yield a problem for each part of config.json that leads to code which the other checks do not see; `where` names that file.

    transformers reads the newest suitable file of `configuration_files`, such as config.5.0.0.json, in place of config.json.
    """
    if "configuration_files" in config:
        message = "model.path: configuration_files makes transformers read another file in place of config.json"
        remedy = "remove configuration_files; if another file of the list is meant, rename it to config.json"
        yield Problem(message, where=where, value=json.dumps(config["configuration_files"])[:_MAX_SHOWN], remedy=remedy)
    for key, value in _items(config):
        if (key == _OTHER_NAMES and value) or (_INTERNAL.fullmatch(key) and key != _FLOAT):
            message = f"model.path: {key} in config.json makes transformers read its values under other names"
            yield Problem(
                message, where=where, value=json.dumps(value)[:_MAX_SHOWN], remedy=f"remove {key}; or choose another model"
            )
    yield from kernel_problems(config, where)


def kernel_problems(config: Any, where: str) -> Iterator[Problem]:
    """Yield a problem for each implementation in config.json that transformers would load from the Hub; `where` names that file.

    The package `kernels` imports what it downloads, at whatever revision the name has, without model.trust_remote_code.
    """
    for key, value in _items(config):
        for name in _texts(value) if _IMPLEMENTATION.fullmatch(key) else ():
            if "/" in name or name in _EXPERTS_OF_HUB:
                message = f"model.path: {key} in config.json takes code from a repository of the Hub"
                yield Problem(message, where=where, value=name, remedy=f"remove {key}; model.attention chooses the kernel")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at any depth, because parts of a model have their own configs."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            yield from _items(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _items(inner)


def _auto_map_classes(value: Any) -> Iterator[str]:
    """Yield every class that an `auto_map` names, at any depth."""
    for key, inner in _items(value):
        if key == "auto_map":
            yield from _texts(inner)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
