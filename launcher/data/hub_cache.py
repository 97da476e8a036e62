"""The folders on this machine that hold repositories of the Hub, in huggingface_hub's layout.

Its client opens, renames and links the files of a download by their paths, one after the other. Users who can write to its cache
could lead it to other files meanwhile. The launcher then only reads that cache, and downloads into its own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from launcher.data.cache_dir import cache_root, mark_used
from launcher.errors import Problem
from launcher.security.folders import is_writable, make_own_folder
from launcher.security.owners import folder_problem

MODELS, DATASETS = "models", "datasets"


def own_folder() -> Path:
    """Return the folder in the launcher's cache for downloads that do not go into the Hub's cache."""
    return cache_root() / "hub"


def repository_folders(repo_id: str, kind: str = MODELS) -> Iterator[Path]:
    """Yield the folders that may hold a repository, the one into which it is downloaded first.

    Raises:
        DataError: if other users could have written the launcher's own folder.
    """
    caches = [_hub_cache()] if _problem() is None else [own_folder(), _hub_cache()]
    for cache in caches:
        folder = cache / f"{kind}--{repo_id.replace('/', '--')}"
        if cache == own_folder() and folder.exists():
            mark_used(folder)
        yield folder


def download_cache(repo_id: str, kind: str = MODELS) -> Path:
    """Return the cache into which a repository is downloaded, and say so if it is not the Hub's.

    Raises:
        DataError: if other users can write to the launcher's cache too.
        OSError: if its folder cannot be created.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    problem = _problem()
    # Offline, nothing is downloaded.
    if problem is None or HF_HUB_OFFLINE:
        return _hub_cache()
    cache = own_folder()
    make_own_folder(cache.parent)
    cache.mkdir(mode=0o700, exist_ok=True)
    _print_once(f"{problem.message}; downloads go to {cache}; to use the Hub's cache: {problem.remedy}")
    return cache


def fetch_dataset_file(repo_id: str, name: str, commit: str) -> Path:
    """Return a file of a dataset at a commit, and download it if it is not on this machine.

    Raises what huggingface_hub raises, and what `download_cache` raises.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for folder in repository_folders(repo_id, DATASETS):
        path = try_to_load_from_cache(repo_id, name, cache_dir=folder.parent, revision=commit, repo_type="dataset")
        if isinstance(path, str):
            return Path(path)
    cache = download_cache(repo_id, DATASETS)
    return Path(hf_hub_download(repo_id, name, repo_type="dataset", revision=commit, cache_dir=cache))


def _problem() -> Problem | None:
    """Return why a repository is not downloaded into the Hub's cache, or None if it is."""
    hub_cache = _hub_cache()
    problem = folder_problem("the Hub's cache", hub_cache)
    if problem is None and not is_writable(hub_cache):
        remedy = "set HF_HOME to a folder that you can write to"
        problem = Problem(f"the Hub's cache cannot be written: {hub_cache}", str(hub_cache), remedy=remedy)
    return problem


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


@functools.cache
def _print_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
