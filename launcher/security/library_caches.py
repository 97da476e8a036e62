"""Folders for what libraries compile and cache: no other user writes to them, and this user can.

torch, triton, CUDA, transformers and W&B keep caches in the home directory and fail where it is read-only or missing, as in many
containers and on some clusters. Compilers of kernels keep code in the folder for temporary files, under names that contain the
name of the user: whoever makes these folders first chooses the code that is loaded. Each cache has a variable that names its
folder.
"""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launcher.security.folders import is_private_folder

# For each cache: its variable; the variable of the folder around it, and that folder in the home directory; its own name.
_CACHES = (
    ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", ".cache", "torch_extensions"),
    ("TRITON_CACHE_DIR", "TRITON_HOME", "", ".triton/cache"),
    ("CUDA_CACHE_PATH", "", ".nv", "ComputeCache"),
    ("HF_MODULES_CACHE", "HF_HOME", ".cache/huggingface", "modules"),
    ("WANDB_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "wandb"),
    ("WANDB_CONFIG_DIR", "XDG_CONFIG_HOME", ".config", "wandb"),
    ("WANDB_DATA_DIR", "XDG_DATA_HOME", ".local/share", "wandb"),
)
# By themselves, these are in the folder for temporary files.
_TEMPORARY_CACHES = (
    ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "torchinductor"),
    ("CUTE_DSL_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "cutlass_python_cache"),
    ("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "flash_attention_cute_dsl_cache"),
    ("QUACK_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "quack_cache"),
)


def find_usable_caches(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set, each with a folder that this user can write, and that no other user can have made first."""
    folders = cache_folders(environ)
    moved = {name: str(folders[name]) for name, *_ in _TEMPORARY_CACHES if not _is_chosen(name, environ)}
    unwritable = [name for name, folder in folders.items() if not _is_chosen(name, environ) and not is_writable(folder)]
    if not unwritable:
        return moved
    folder = _private_folder()
    return {**moved, **{name: str(folder / name.lower()) for name in unwritable}}


def cache_folders(environ: Mapping[str, str]) -> dict[str, Path]:
    """Return the folder of each cache, by the variable that names it."""
    home = Path(environ.get("HOME") or "/")
    return {
        variable: Path(
            environ[variable] if _is_chosen(variable, environ) else Path(environ.get(parent_variable) or home / parent) / name
        )
        for variable, parent_variable, parent, name in (*_CACHES, *_TEMPORARY_CACHES)
    }


def _is_chosen(variable: str, environ: Mapping[str, str]) -> bool:
    """Return whether somebody has named the folder of a cache; torch sets its variable to its own default when it is imported."""
    value = environ.get(variable)
    return bool(value) and not (variable == "TORCHINDUCTOR_CACHE_DIR" and value == _default_of_inductor())


def _default_of_inductor() -> str:
    """Return the folder that torch/_inductor/runtime/cache_dir_utils.py chooses."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid_{os.getuid()}"
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def is_writable(folder: Path) -> bool:
    """Return whether the folder, or the closest one above it that exists, can be written."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def node_cache_root() -> Path:
    """Return the folder for what libraries compile on a node whose home directory cannot be written; anyone can make it first."""
    return Path(tempfile.gettempdir()) / f"launcher-caches-{os.geteuid()}"


def _private_folder() -> Path:
    """Return a folder on this node that later attempts find again; another one if it belongs to somebody else.

    Libraries load compiled code from it.
    """
    folder = node_cache_root()
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    if is_private_folder(folder):
        return folder
    return Path(tempfile.mkdtemp(prefix="launcher-caches-"))
