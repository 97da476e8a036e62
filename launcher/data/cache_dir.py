"""The caches on this machine: the launcher's own, repositories of the Hub, and errors for failed writes.

huggingface_hub's client opens, renames and links the files of a download by their paths, one after the other. Users who can write
to its cache could lead it to other files meanwhile. The launcher then only reads that cache, and downloads into its own.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from launcher.errors import DataError, Problem
from launcher.hardware import is_full
from launcher.plan.quantities import format_size
from launcher.security.folders import folder_problem, is_writable, make_own_folder, require_cache

SHARED_CACHE_VARIABLE = "LAUNCHER_SHARED_CACHE"
MODELS, DATASETS = "models", "datasets"


def cache_root() -> Path:
    """Return $LAUNCHER_CACHE, else $XDG_CACHE_HOME/launcher, else ~/.cache/launcher. Raises DataError if others can change it."""
    root = cache_path()
    require_cache(root)
    return root


def cache_path() -> Path:
    """Return the folder of `cache_root`, whoever can write to it."""
    if root := os.environ.get("LAUNCHER_CACHE"):
        return Path(root).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "launcher"


def shared_cache_root() -> Path | None:
    """Return $LAUNCHER_SHARED_CACHE, where groups share their data caches; None if unset."""
    root = os.environ.get(SHARED_CACHE_VARIABLE)
    return Path(root).expanduser().absolute() if root else None


def source_folder(*parts: object) -> Path:
    """Return the folder for the files and records of a remote source, identified by `parts`."""
    return cache_root() / "sources" / xxhash.xxh3_128_hexdigest(json.dumps([str(part) for part in parts]).encode())


def mark_used(folder: Path) -> None:
    """Record that a command has found this part of the cache and may use it; `clean` checks the folder's time."""
    # The folder may belong to another user, or the storage may be mounted read-only.
    with suppress(OSError):
        os.utime(folder)


@contextmanager
def convert_os_errors(folder: Path) -> Iterator[None]:
    """Convert an OSError into a DataError with a remedy, while `folder` in the launcher's cache is read or written."""
    try:
        yield
    except OSError as error:
        raise make_cache_error(error, folder) from error


def make_cache_error(error: OSError, folder: Path) -> DataError:
    """Return the user's error: the size written to `folder`, the free space, and the remedy."""
    elsewhere = f"set LAUNCHER_CACHE to a folder on another disk (now {cache_root()})"
    message = f"the launcher's cache cannot be used: {error.strerror or error}"
    if not is_full(error):
        remedy = f"check that this user may write there and that the disk works, or {elsewhere}"
        return DataError(message, str(error.filename or folder), remedy=remedy)
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    value = f"{format_size(shutil.disk_usage(existing).free)} are free on its disk without the unfinished files"
    return DataError(message, str(folder), value, f"free more space (or raise the quota), or {elsewhere}")


# Repositories of the Hub


def own_hub_cache() -> Path:
    """Return the folder in the launcher's cache for downloads that do not go into the Hub's cache."""
    return cache_root() / "hub"


def repository_folders(repo_id: str, kind: str = MODELS) -> Iterator[Path]:
    """Yield the folders that may hold a repository, the one into which it is downloaded first. Raises DataError."""
    caches = [_locate_hub_cache()] if _find_hub_cache_problem() is None else [own_hub_cache(), _locate_hub_cache()]
    for cache in caches:
        folder = cache / f"{kind}--{repo_id.replace('/', '--')}"
        if cache == own_hub_cache() and folder.exists():
            mark_used(folder)
        yield folder


def download_cache() -> Path:
    """Return the cache into which repositories are downloaded, and say so if it is not the Hub's. Raises DataError, OSError."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    problem = _find_hub_cache_problem()
    # Offline, nothing is downloaded.
    if problem is None or HF_HUB_OFFLINE:
        return _locate_hub_cache()
    cache = own_hub_cache()
    make_own_folder(cache.parent)
    cache.mkdir(mode=0o700, exist_ok=True)
    print_once(f"{problem.message}; downloads go to {cache}; to use the Hub's cache: {problem.remedy}")
    return cache


def fetch_dataset_file(repo_id: str, name: str, commit: str) -> Path:
    """Return a file of a dataset at a commit, downloaded if it is not on this machine. Raises errors of huggingface_hub, too."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for folder in repository_folders(repo_id, DATASETS):
        path = try_to_load_from_cache(repo_id, name, cache_dir=folder.parent, revision=commit, repo_type="dataset")
        if isinstance(path, str):
            return Path(path)
    return Path(hf_hub_download(repo_id, name, repo_type="dataset", revision=commit, cache_dir=download_cache()))


def _find_hub_cache_problem() -> Problem | None:
    """Return why a repository is not downloaded into the Hub's cache, or None if it is."""
    hub_cache = _locate_hub_cache()
    problem = folder_problem("the Hub's cache", hub_cache)
    if problem is None and not is_writable(hub_cache):
        remedy = "set HF_HOME to a folder that you can write to"
        problem = Problem(f"the Hub's cache cannot be written: {hub_cache}", str(hub_cache), remedy=remedy)
    return problem


def _locate_hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


@functools.cache
def print_once(text: str) -> None:
    """Print a notice to standard error, unless this process has printed it before."""
    print(text, file=sys.stderr, flush=True)
