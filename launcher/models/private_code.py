"""A private copy of the code that comes with a model, so that the code that was checked is the code that runs.

transformers reuses copies of such code from a folder of its own, whoever wrote them. So it loads from one that only this user can
enter.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError
from launcher.models.remote_code import (
    ADAPTER,
    digest_problems,
    owner_problem,
    python_files,
)

_CONFIG = "config.json"
# transformers copies the code of models there, reuses existing copies, and reads the variable when it is imported.
MODULES_CACHE = "HF_MODULES_CACHE"
# transformers' function that finds a file of code and copies it to the folder of modules: all code passes it.
_FIND = "get_cached_module_file"
# transformers' option, which nothing else in the launcher sets.
TRUST = "trust_remote_code"
_numbers = itertools.count()


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
    files. The code must have the digest. Without a digest, as with a pinned commit from the Hub, its folder must belong to owners
    whom this user trusts. `code` is the folder of the Python files, if that is another folder.

    Raises:
        ConfigError: if other code would run.
        OSError: if a file cannot be read, or copied.
    """
    _hide_kernels()
    _admit_private_copies_only()
    if not trusts_code or not (folder / _CONFIG).is_file():
        return folder
    source = folder if code is None else code
    # transformers names a model's modules after its folder.
    copy = _private_folder() / str(next(_numbers)) / folder.resolve().name
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
    if _private_folder.cache_info().currsize:
        _remove(_private_folder(), os.getpid())


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

    Raises:
        ConfigError: from then on, where transformers would import other code.
    """
    # Only the worker side calls this; the submit side imports this module without transformers.
    dynamic_module_utils = importlib.import_module("transformers.dynamic_module_utils")
    find: Callable[..., str] = getattr(dynamic_module_utils, _FIND)

    @functools.wraps(find)
    def find_in_copy(source: Any, module_file: str, *args: Any, **options: Any) -> str:
        if not Path(os.path.realpath(source)).is_relative_to(os.path.realpath(_private_folder())):
            message = "model.path: the model leads to code that is not its own pinned code; it is not run"
            remedy = "look in config.json for what names it, and remove that; or choose another model"
            raise ConfigError(message, where="model.path", value=f"{source}: {module_file}", remedy=remedy)
        return find(source, module_file, *args, **options)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "transformers" and vars(module).get(_FIND) is find:
            setattr(module, _FIND, find_in_copy)


@functools.cache
def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="launcher-code-"))
    # Forked processes do not remove it.
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def use_private_modules() -> Path:
    """Make transformers copy code to a private folder and import it from there, even if transformers is already imported.

    Returns the folder, which other packages that read HF_MODULES_CACHE also use.
    """
    modules = _private_folder() / "modules"
    modules.mkdir()
    os.environ[MODULES_CACHE] = str(modules)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "transformers" and MODULES_CACHE in vars(module):
            setattr(module, MODULES_CACHE, str(modules))
    # Put it before all folders that may contain modules of that name.
    sys.path.insert(0, str(modules))
    return modules
