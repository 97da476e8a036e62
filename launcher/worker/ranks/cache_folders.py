"""Folders for what libraries compile and cache, on a node whose home directory cannot be written.

torch, triton, CUDA, transformers and W&B keep caches in the home directory and fail where it is read-only or missing, as in many
containers and on some clusters. Each of them has a variable that names another folder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launcher.data.cache_dir import node_cache_root
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


def find_writable_caches(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set, each with a folder that can be written; empty where all default folders can be."""
    unwritable = [
        variable for variable, folder in cache_folders(environ).items() if not environ.get(variable) and not is_writable(folder)
    ]
    if not unwritable:
        return {}
    folder = _private_folder()
    return {variable: str(folder / variable.lower()) for variable in unwritable}


def cache_folders(environ: Mapping[str, str]) -> dict[str, Path]:
    """Return the folder of each cache, by the variable that names it."""
    home = Path(environ.get("HOME") or "/")
    return {
        variable: Path(environ.get(variable) or Path(environ.get(parent_variable) or home / parent) / name)
        for variable, parent_variable, parent, name in _CACHES
    }


def is_writable(folder: Path) -> bool:
    """Return whether the folder, or the closest one above it that exists, can be written."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _private_folder() -> Path:
    """Return a folder on this node that later attempts find again; another one if it belongs to somebody else.

    Ranks load compiled code from it.
    """
    folder = node_cache_root()
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    if is_private_folder(folder):
        return folder
    return Path(tempfile.mkdtemp(prefix="launcher-caches-"))
