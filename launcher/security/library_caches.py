"""Folders for what libraries compile and cache: this user can write to them, and no other user can.

torch, triton, CUDA, transformers and W&B keep caches in the home directory and fail if it is read-only or missing, as in many
containers and on some clusters. Kernel compilers keep code in the temporary folder, under names that contain the user name:
whoever creates these folders first chooses the code that is loaded. Each cache has a variable that names its folder. A folder
that other users can write to or create first is replaced, whoever named it: W&B and Xet follow links that others put there.
"""

from __future__ import annotations

import functools
import getpass
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher.errors import Problem
from launcher.security.folders import is_private_folder, make_own_folder
from launcher.security.permissions import first_problem_of_cache, tree
from launcher.security.trust import Trust

# Caches of libraries that commands use, too.
XET, WANDB = ("HF_XET_CACHE",), ("WANDB_CACHE_DIR", "WANDB_DATA_DIR")
# For each cache: its variable; the variable for its parent folder, and that folder in the home directory; its own name.
_CACHES = (
    ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", ".cache", "torch_extensions"),
    ("TRITON_CACHE_DIR", "TRITON_HOME", "", ".triton/cache"),
    ("CUDA_CACHE_PATH", "", ".nv", "ComputeCache"),
    ("HF_MODULES_CACHE", "HF_HOME", ".cache/huggingface", "modules"),
    # Xet keeps the description of an upload there until it sends it, and writes logs, for which it follows links.
    ("HF_XET_CACHE", "HF_HOME", ".cache/huggingface", "xet"),
    ("WANDB_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "wandb"),
    ("WANDB_CONFIG_DIR", "XDG_CONFIG_HOME", ".config", "wandb"),
    ("WANDB_DATA_DIR", "XDG_DATA_HOME", ".local/share", "wandb"),
)
# Whatever TORCHINDUCTOR_CACHE_DIR names, torch looks for these in a folder of a known name in the temporary folder: precompiled
# headers, which become part of each C++ kernel, and pickled decisions. These values turn both off. The headers halve the time
# of compilation: launcher/train/kernels/layers.py turns them on again if nobody else can have written to that folder.
_WITHOUT_FOLDER = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "TORCHINDUCTOR_ENABLE_CACHING_MODULE": "0"}
# W&B settings there may name the server, so another folder could lead to a different server. Where W&B starts, other users'
# settings are refused.
_NOT_REPLACED = "WANDB_CONFIG_DIR"
_INDUCTOR, _EXTENSIONS = "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"
# How many levels of a cache are checked, if more than one. Compilers keep each kernel in a folder of the first level, torch each
# extension in files of the third, which it replaces.
_LEVELS = {_EXTENSIONS: 3, "HF_XET_CACHE": 2, "WANDB_CACHE_DIR": 2, "WANDB_DATA_DIR": 2}
# By default, these are in the temporary folder.
_TEMPORARY_CACHES = (
    (_INDUCTOR, "XDG_CACHE_HOME", ".cache", "torchinductor"),
    ("CUTE_DSL_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "cutlass_python_cache"),
    ("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "flash_attention_cute_dsl_cache"),
    ("QUACK_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "quack_cache"),
)


@functools.cache
def _print_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def find_usable_caches(environ: Mapping[str, str], alert: Callable[[str], None] = _print_once) -> dict[str, str]:
    """Return the variables to set, each with a folder that this user can write to and no other user can have created first.

    Two of them turn off caches whose folder cannot be chosen. `alert` is called for each folder that is replaced because other
    users could write to it.
    """
    folders = cache_folders(environ)
    if not _is_chosen(_INDUCTOR, environ):
        # torch creates it as the umask says, and the next command would not trust it.
        with suppress(OSError):
            make_own_folder(folders[_INDUCTOR])
    problems = foreign_caches(environ)
    # Several caches may lie in the same folder of others, such as HF_HOME.
    variables = dict[tuple[str, str], list[str]]()
    for variable, problem in problems.items():
        variables.setdefault((problem.message.partition(": ")[2], problem.remedy), []).append(variable)
    for (reason, remedy), names in variables.items():
        alert(f"{', '.join(names)}: {reason}; a private folder is used instead; to use yours: {remedy}")
    moved = {name: str(folders[name]) for name, *_ in _TEMPORARY_CACHES if not _is_chosen(name, environ)}
    replaced = [name for name, folder in folders.items() if name in problems or _is_closed(name, folder, environ)]
    return {**_WITHOUT_FOLDER, **moved, **_replacements(replaced)}


def _replacements(variables: Sequence[str]) -> dict[str, str]:
    if not variables:
        return {}
    folder = _private_folder()
    return {variable: str(folder / variable.lower()) for variable in variables}


def _is_closed(variable: str, folder: Path, environ: Mapping[str, str]) -> bool:
    """Return whether this user cannot write to a library's default folder."""
    return not _is_chosen(variable, environ) and not is_writable(folder)


def foreign_caches(environ: Mapping[str, str]) -> dict[str, Problem]:
    """Return why other users could have put code or links into a cache, keyed by the variable that names its folder."""
    trust = Trust.from_environ(environ)
    problems = {
        variable: _problem(variable, folder, trust)
        for variable, folder in cache_folders(environ).items()
        if variable != _NOT_REPLACED
    }
    return {variable: problem for variable, problem in problems.items() if problem is not None}


def is_own_folder(folder: Path) -> bool:
    """Create a folder in an existing one, if it is missing; return whether no other user can have written what is in it."""
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    return first_problem_of_cache("this folder", folder, tree(folder), Trust.from_environ(os.environ)) is None


def _problem(variable: str, folder: Path, trust: Trust) -> Problem | None:
    """Return why other users could have put code or links into a cache, or None.

    The launcher creates its folder closed to others. Other programs then create folders in it, perhaps with another umask.
    """
    content = _content(folder, _LEVELS.get(variable, 1), with_files=variable == _EXTENSIONS)
    problem = first_problem_of_cache(f"what {variable} names", folder, content, trust)
    if problem is None or folder not in Path(problem.where).parents:
        return problem
    return replace(problem, remedy=problem.remedy.replace(f"-w {problem.where}", f"-w -R {folder}"))


def _content(folder: Path, num_levels: int, with_files: bool) -> Iterator[Path]:
    """Yield the folders in a cache, and its files if they are requested, but no links."""
    pending = [(os.fspath(folder), num_levels)]
    while pending:
        parent, levels = pending.pop()
        with suppress(OSError), os.scandir(parent) as entries:
            for entry in entries:
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder or (with_files and entry.is_file(follow_symlinks=False)):
                    yield Path(entry.path)
                if is_folder and levels > 1:
                    pending.append((entry.path, levels - 1))


def cache_folders(environ: Mapping[str, str]) -> dict[str, Path]:
    """Return the folder of each cache, keyed by the variable that names it."""
    home = Path(environ.get("HOME") or "/")
    parents = {"HF_HOME": str(Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface"), **environ}
    return {
        variable: Path(
            environ[variable] if _is_chosen(variable, environ) else Path(parents.get(parent_variable) or home / parent) / name
        )
        for variable, parent_variable, parent, name in (*_CACHES, *_TEMPORARY_CACHES)
    }


def _is_chosen(variable: str, environ: Mapping[str, str]) -> bool:
    """Return whether a cache's folder was named explicitly; on import, torch sets its variable to its own default."""
    value = environ.get(variable)
    return bool(value) and not (variable == _INDUCTOR and value == _default_of_inductor())


def _default_of_inductor() -> str:
    """Return the folder that torch/_inductor/runtime/cache_dir_utils.py chooses."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid_{os.getuid()}"
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def is_writable(folder: Path) -> bool:
    """Return whether the folder, or its closest existing parent, is writable."""
    existing = next((path for path in (folder, *folder.parents) if os.path.exists(path)), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def node_cache_root() -> Path:
    """Return the folder for compiled code on a node whose home directory is not writable; any user can create it first."""
    return Path(tempfile.gettempdir()) / f"launcher-caches-{os.geteuid()}"


def _private_folder() -> Path:
    """Return a folder on this node that later attempts find again, or a different one if it belongs to another user.

    Libraries load compiled code from it.
    """
    folder = node_cache_root()
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    if is_private_folder(folder):
        return folder
    return Path(tempfile.mkdtemp(prefix="launcher-caches-"))
