"""Python code that comes with a model: which of it transformers may run, how it is pinned, and the private copy that runs.

transformers runs the classes that `auto_map` in config.json names. A Hub model is pinned by its commit, a folder by a digest of
its code (`model.code_digest`). transformers reuses copies of such code from a folder of its own, whoever wrote them, so it loads
from a private copy that only this user can enter: the code that was checked is the code that runs. The submit side only checks.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib
import importlib.util
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.sections.model import ModelSection, is_local_path, is_run
from launcher.errors import ConfigError, Problem
from launcher.security.folders import folder_problem

ADAPTER = "adapter_config.json"
# Keys of config.json with which transformers finds classes of a model that it does not load from a folder.
_NAMES_CODE = frozenset({"auto_map", "name_or_path", "_name_or_path"})
_CONFIG = "config.json"
# transformers copies the code of models there, reuses existing copies, and reads the variable when it is imported.
MODULES_CACHE = "HF_MODULES_CACHE"
# transformers' function that finds a file of code and copies it to the folder of modules: all code passes it.
_FIND = "get_cached_module_file"
# transformers' option, which nothing else in the launcher sets.
TRUST = "trust_remote_code"
_numbers = itertools.count()


def code_digest(folder: Path) -> str | None:
    """Return the SHA-256 of the names and contents of all Python files below a folder; None if there are none."""
    files = sorted((str(path.relative_to(folder)), path) for path in python_files(folder))
    digest = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest() if files else None


def code_problems(model: ModelSection, folder: Path | None) -> Iterator[Problem]:
    """Yield why the code of a model may not run; `folder` is None if the model is not on this machine yet."""
    if not model.trust_remote_code:
        return
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


def code_option(trusts_code: bool, folder: Path | None) -> dict[str, bool]:
    """Return the option with which transformers may run the code of the model in `folder`, and refuses all other code.

    `folder` is what `folder_to_load` has returned. A model without a folder has no code that could be pinned.
    """
    _hide_kernels()
    _admit_private_copies_only()
    return {TRUST: trusts_code and folder is not None}


def folder_to_load(folder: Path, trusts_code: bool, digest: str | None, code: Path | None = None) -> Path:
    """Return the folder from which transformers may load the model in `folder`.

    For a model that may run its own code, this is a private copy of config.json and the Python files, with links to the other
    files. The code must have the digest. Without a digest, as with a pinned commit from the Hub, its folder must belong to
    owners whom this user trusts. `code` is the folder of the Python files, if that is another folder. Raises ConfigError if
    other code would run. Raises OSError if a file cannot be read, or copied.
    """
    _hide_kernels()
    _admit_private_copies_only()
    if not trusts_code or not (folder / _CONFIG).is_file():
        return folder
    source = folder if code is None else code
    # transformers names a model's modules after its folder.
    copy = _make_private_folder() / str(next(_numbers)) / folder.resolve().name
    copy.mkdir(parents=True)
    shutil.copyfile(folder / _CONFIG, copy / _CONFIG)
    # List the files once: transformers cannot find a file that is added later.
    for file in python_files(source):
        target = copy / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    problems = [owner_problem(source)] if digest is None else digest_problems(copy, digest, source)
    if found := list(filter(None, problems)):
        raise ConfigError(found)
    for file in folder.iterdir():
        # Given an adapter, transformers would load the model that the adapter names.
        if file.suffix != ".py" and file.name not in (_CONFIG, ADAPTER) and file.is_file():
            (copy / file.name).symlink_to(folder.resolve() / file.name)
    use_private_modules()
    return copy


def remove_copies() -> None:
    """Remove the private copies of this process, as a normal exit does."""
    if _make_private_folder.cache_info().currsize:
        _remove(_make_private_folder(), os.getpid())


def _hide_kernels() -> None:
    """Make the package `kernels` look as if it were not installed, also to transformers if it is already imported.

    It downloads code and runs it, for example if config.json names flash_attention_2 and flash-attn is not installed.
    """
    sys.modules["kernels"] = None  # type: ignore[assignment]
    utils = sys.modules.get("transformers.utils.import_utils")
    if utils is not None:
        utils.is_kernels_available.cache_clear()


@functools.cache
def _admit_private_copies_only() -> None:
    """Make transformers refuse, in this process, to import the code of a model from anywhere but a private copy.

    Many things lead it to other code: what config.json names, also under names that the checks do not know, a task, a setting.
    Raises ConfigError from then on, where transformers would import other code.
    """
    # Only the worker side calls this; the submit side imports this module without transformers.
    dynamic_module_utils = importlib.import_module("transformers.dynamic_module_utils")
    find: Callable[..., str] = getattr(dynamic_module_utils, _FIND)

    @functools.wraps(find)
    def find_in_copy(source: Any, module_file: str, *args: Any, **options: Any) -> str:
        if not Path(os.path.realpath(source)).is_relative_to(os.path.realpath(_make_private_folder())):
            message = "model.path: the model leads to code that is not its own pinned code; it is not run"
            remedy = "look in config.json for what names it, and remove that; or choose another model"
            raise ConfigError(message, where="model.path", value=f"{source}: {module_file}", remedy=remedy)
        return find(source, module_file, *args, **options)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "transformers" and vars(module).get(_FIND) is find:
            setattr(module, _FIND, find_in_copy)


@functools.cache
def _make_private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="launcher-code-"))
    # Forked processes do not remove it.
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def use_private_modules() -> Path:
    """Make transformers copy code to a private folder, which is returned, and import it from there, also if already imported."""
    modules = _make_private_folder() / "modules"
    modules.mkdir()
    os.environ[MODULES_CACHE] = str(modules)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "transformers" and MODULES_CACHE in vars(module):
            setattr(module, MODULES_CACHE, str(modules))
    # Put it before all folders that may contain modules of that name.
    sys.path.insert(0, str(modules))
    return modules
