"""Python code that comes with a model: what transformers may run of it, and how it is pinned.

transformers runs the classes that `auto_map` in config.json names, and takes `owner/name--module.Class` from another repository,
at its newest commit. A Hub model is pinned by its commit, a folder by a digest of its code (`model.code_digest`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.config.schema import ModelSection, is_local_path, is_run
from launcher.errors import ConfigError, Problem
from launcher.models import weight_files

_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
_ADAPTER = "adapter_config.json"


def code_digest(folder: Path) -> str | None:
    """Return the SHA-256 of the names and contents of all Python files below a folder; None if there are none."""
    files = sorted((str(path.relative_to(folder)), path) for path in folder.rglob("*.py") if path.is_file())
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest() if files else None


def require_pinned_code(model: ModelSection, folder: Path | None) -> None:
    """Check, before transformers loads from `folder`, that it runs only the code that the settings pin.

    A run without a digest was checked when it was submitted.

    Raises:
        ConfigError: where other code would run.
    """
    if folder is None or not model.trust_remote_code or not (folder / "config.json").is_file():
        return
    problems = list(_foreign_classes(weight_files.read_json(folder / "config.json"), str(folder / "config.json")))
    if model.code_digest is not None:
        problems += _digest_problems(model, folder)
    if problems:
        raise ConfigError(problems)


def code_problems(model: ModelSection, config: Mapping[str, Any], folder: Path | None, where: str) -> Iterator[Problem]:
    """Yield why the code of a model may not run. `config` is its config.json, and `where` names that file for the user.

    `folder` is None where the model is not on this machine yet.
    """
    if not model.trust_remote_code:
        return
    yield from _foreign_classes(config, where)
    if folder is not None and (model.code_digest is not None or is_local_path(model.path or "") or is_run(model.path)):
        yield from _digest_problems(model, folder)


def adapter_problems(folder: Path) -> Iterator[Problem]:
    """Yield a problem where transformers would load the base model of an adapter, which may be any repository, instead."""
    if (folder / _ADAPTER).is_file() and importlib.util.find_spec("peft") is not None:
        yield Problem(
            f"model.path: {_ADAPTER} makes transformers load another model, which it names, and an adapter",
            where=str(folder / _ADAPTER),
            remedy="merge the adapter into its model and use that folder; if this is the whole model, delete the file",
        )


def _digest_problems(model: ModelSection, folder: Path) -> Iterator[Problem]:
    actual = code_digest(folder)
    if actual == model.code_digest:
        return
    if actual is None:
        message, remedy = "the folder has no Python code", "remove model.code_digest and model.trust_remote_code"
    elif model.code_digest is None:
        message = "the code of the folder is not pinned: whoever may write there chooses what runs"
        remedy = f"read the *.py files; if you trust them, set model.code_digest={actual}"
    else:
        message = "the code of the folder is not the code that model.code_digest pins"
        remedy = f"find out who changed it; if you trust the files as they are, set model.code_digest={actual}"
    yield Problem(f"model.path: {message}", where=str(folder), value=str(model.code_digest or ""), remedy=remedy)


def _foreign_classes(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    for name in _auto_map_classes(config):
        if _CLASS.fullmatch(name):
            continue
        message = "auto_map names code outside of the model"
        if "--" in name:
            message = "auto_map takes code from another repository, at whatever commit is its newest"
        remedy = "copy that code into a folder with the model, read it, and write module.Class in auto_map"
        yield Problem(f"model.path: {message}", where=where, value=name, remedy=remedy)


def _auto_map_classes(value: Any) -> Iterator[str]:
    """Yield every class that an `auto_map` names, at any depth: parts of a model have configs of their own."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "auto_map":
                yield from _texts(inner)
            else:
                yield from _auto_map_classes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _auto_map_classes(inner)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
