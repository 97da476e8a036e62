"""A Hub's answers determine file names in this user's cache: the server at HF_ENDPOINT must not choose files elsewhere.

huggingface_hub appends the ETag and commit that a server sends to its cache path unchanged. An ETag such as
`../../../.config/x` would write a file with the server's content there. It also takes ETags from lists of files in the cache, and
follows links there, which other users may have left if they can write to HF_HOME, or may put there during the download: it opens,
renames and removes files by their paths, one after the other. What it does to files of a repository leads through open folders.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.errors import DataError, Problem
from launcher.security import ownership
from launcher.security.path_steps import entry_in_open_folder
from launcher.security.permissions import tree
from launcher.security.port_owners import server_problem
from launcher.security.trust import FLAG, user_name

# Headers and JSON keys whose values become names of files and folders.
_HEADERS = ("ETag", "X-Linked-ETag", "X-Repo-Commit")
# Xet's client takes the address of its storage from this header, and makes folders at local://PATH.
_STORAGE = "X-Xet-Cas-Url"
_KEYS = frozenset({"sha", "oid", "sha256", "blobId", "commitOid"})
# JSON answers are read as a whole; the longest file lists have tens of MB. Files are written as they arrive.
_JSON_PATH = "/api/"
_MAX_JSON_BYTES, _MAX_JSON_S = 256 << 20, 300.0
# The client waits for as long as one of these headers says.
_WAITS, _MAX_WAIT_S = ("Retry-After", "RateLimit"), 600
_ENDPOINT = "HF_ENDPOINT"
_REMEDY = "set HF_ENDPOINT to a server that you trust, or unset it for huggingface.co"
# The function with which the client reads a list of a commit's files from its cache.
_READ_LISTING = "_read_tree_cache_from_disk"
# The client's functions that download a file to blobs/, move it to its place (after a chmod by path), link to it in snapshots/,
# and note the commit of a branch in refs/.
_DOWNLOAD, _MOVE, _LINK = "_download_to_tmp_and_move", "_chmod_and_move", "_create_symlink"
_NOTE_COMMIT = "_cache_commit_hash_for_specific_revision"
# Its list of programs that may have started it, which its requests name.
_AGENTS = "_registry"
# All that is replaced, by module.
_REPLACED = {
    "huggingface_hub._tree_cache": (_READ_LISTING,),
    "huggingface_hub.file_download": (_DOWNLOAD, _MOVE, _LINK, _NOTE_COMMIT),
    "huggingface_hub._snapshot_download": (_NOTE_COMMIT,),
    "huggingface_hub.utils._detect_agent": (_AGENTS,),
}
# A file system without links answers with one of these, a folder without write permission with another.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


@functools.cache
def guard_hub_client() -> None:
    """Make huggingface_hub reject answers with such names in this process. Call it before the client is used.

    Raises:
        DataError: if another user listens at the address of HF_ENDPOINT, on this machine, and would get the token; or if others
            can write to the cache, and the installed client lacks what is replaced to protect it.
    """
    if problem := server_problem(_ENDPOINT, os.environ.get(_ENDPOINT, "")):
        raise DataError(problem)
    if missing := _missing_parts():
        _refuse_shared_cache(missing)
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    make_client = _http._GLOBAL_CLIENT_FACTORY

    def make_guarded_client() -> Any:
        client: Any = make_client()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [_check, *hooks["response"]]}
        return client

    set_client_factory(make_guarded_client)
    if not missing:
        ignore_listings_of_others()
        write_through_no_links()


def _missing_parts() -> list[str]:
    """Return the parts of huggingface_hub that are replaced and that the installed version does not have."""
    missing = []
    for module, names in _REPLACED.items():
        try:
            content = vars(importlib.import_module(module))
        except ImportError:
            content = {}
        missing += [f"{module}.{name}" for name in names if name not in content]
    return missing


def _refuse_shared_cache(missing: list[str]) -> None:
    """Refuse a cache to which other users can write if what protects it cannot be installed in huggingface_hub.

    Raises:
        DataError: with the folder.
    """
    from huggingface_hub import __version__ as version
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    for folder in map(Path, (HF_HOME, HF_HUB_CACHE)):
        content = [path for path in folder.glob("*") if path.is_dir()]
        if problem := ownership.folder_problem("the Hub's cache", folder, content, may_be_hidden=True):
            message = f"huggingface_hub {version} cannot be kept from following what other users put into the Hub's cache"
            remedy = f"set HF_HOME to a folder of your own; or install an earlier version (huggingface_hub<{version}); or "
            raise DataError(Problem(message, str(folder), f"it lacks {', '.join(missing)}", remedy + problem.remedy))


def ignore_listings_of_others() -> None:
    """Make huggingface_hub ask the server where its cache has a list of files that other users could have written."""
    from huggingface_hub import _tree_cache

    read = getattr(_tree_cache, _READ_LISTING)

    @functools.wraps(read)
    def read_own(path: str) -> Any:
        return None if ownership.file_problem("the list of a repository's files", Path(path)) is not None else read(path)

    setattr(_tree_cache, _READ_LISTING, read_own)


def write_through_no_links() -> None:
    """Make huggingface_hub change no file to which another user's link leads, even if it is put there during a download."""
    from huggingface_hub import _snapshot_download, file_download
    from huggingface_hub.utils import _detect_agent

    client_download = getattr(file_download, _DOWNLOAD)

    def download(incomplete_path: Path, destination_path: Path, *rest: Any, **options: Any) -> None:
        uses_xet = options.get("xet_file_data") is not None and file_download.is_xet_available()
        # Xet is off where others could exchange files. A download to a folder other than the cache has two folders.
        if uses_xet or incomplete_path.parent != destination_path.parent:
            return client_download(incomplete_path, destination_path, *rest, **options)
        with entry_in_open_folder(_in_chosen_cache(destination_path)) as entry:
            return client_download(Path(entry).with_name(incomplete_path.name), Path(entry), *rest, **options)

    # With any list, the client does not fetch one from the Hub and write it to a file of a known name in HF_HOME.
    setattr(_detect_agent, _AGENTS, {"standardEnvVars": [], "harnesses": {}})
    for name, function in ((_DOWNLOAD, download), (_MOVE, _move), (_LINK, _link), (_NOTE_COMMIT, _note_commit)):
        setattr(file_download, name, function)
    setattr(_snapshot_download, _NOTE_COMMIT, _note_commit)


def _move(source: Path, target: Path) -> None:
    # The client's own function sets the mode that the file has: that of a file which this process creates.
    try:
        os.replace(source, target)
    except OSError:
        # They are on different file systems, or this one replaces no files. Others cannot guess the name of the copy.
        unfinished = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            shutil.move(str(source), str(unfinished))
            target.unlink(missing_ok=True)
            os.rename(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)


def _link(src: str, dst: str, new_blob: bool = False) -> None:
    """Put a link to a downloaded file into a snapshot; where there are no links, put the file there.

    The client's own function first removes what is there, by its path.
    """
    from huggingface_hub import constants

    with entry_in_open_folder(_in_chosen_cache(Path(dst))) as entry:
        unfinished = f"{entry}.{secrets.token_hex(8)}.tmp"
        try:
            if getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
                raise OSError(errno.EOPNOTSUPP, "links are turned off")
            os.symlink(os.path.relpath(src, os.path.dirname(dst)), unfinished)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with entry_in_open_folder(_in_chosen_cache(Path(src))) as blob:
                (os.replace if new_blob else shutil.copyfile)(blob, unfinished)
        os.replace(unfinished, entry)


def _note_commit(storage_folder: str, revision: str, commit_hash: str) -> None:
    if revision == commit_hash:
        return
    reference = Path(storage_folder) / "refs" / revision
    with entry_in_open_folder(_in_chosen_cache(reference), make_folder=True) as entry:
        path = Path(entry)
        if not path.exists() or path.read_text() != commit_hash:
            unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
            unfinished.write_text(commit_hash)
            os.replace(unfinished, path)


def _in_chosen_cache(path: Path) -> Path:
    """Return a path without the links that lead to the Hub's cache: they are part of the path that the user chose."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).resolve() / path.relative_to(HF_HUB_CACHE) if path.is_relative_to(HF_HUB_CACHE) else path


def require_own_links(repo_id: str, kind: str = "models", warns: bool = True) -> None:
    """Refuse to download a repository if the client would write through another user's link in its folder of the Hub's cache.

    Where others could put such links during the download, the client does without Xet in this process; `warns` tells the user.

    Raises:
        DataError: with the link.
    """
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        # Nothing is downloaded.
        return
    cache, name = Path(HF_HUB_CACHE), f"{kind}--{repo_id.replace('/', '--')}"
    for folder in (cache / name, cache / ".locks" / name):
        for path in (folder, *tree(folder)):
            with suppress(OSError):
                # Earlier versions of the client append to a file of a known name. Other links to files are those of snapshots.
                is_written = path.is_symlink() and (path.is_dir() or path.suffix == ".incomplete")
                if is_written and not ownership.accepts_owner(owner := path.lstat().st_uid):
                    user = user_name(owner)
                    message = f"{repo_id} is not downloaded: a link of {user} in the Hub's cache leads elsewhere"
                    remedy = f"set HF_HOME to a folder of your own; or if you trust {user} with your account, add {FLAG} {user}"
                    raise DataError(Problem(message, str(path), os.readlink(path), remedy))
    _do_without_xet(cache, name, warns)


def _do_without_xet(cache: Path, name: str, warns: bool) -> None:
    """Turn Xet off, or the blobs that repositories share, where others could exchange files and folders during the download.

    Xet's client opens a file of a known folder by its path, for the second time, and overwrites what a link there leads to. The
    store of shared blobs changes the modes of folders by their paths.
    """
    from huggingface_hub import constants

    folder, subject = cache / name, f"the folder of {name.partition('--')[2].replace('--', '/')} in the Hub's cache"
    if ownership.folder_problem("the Hub's cache", cache, [cache / "blobs"], may_be_hidden=True):
        # Earlier versions have no such store.
        setattr(constants, "HF_HUB_DISABLE_SHARED_BLOBS", True)  # noqa: B010
        with suppress(OSError):
            # If the cache is sticky, nobody else can create or exchange this folder from now on.
            folder.mkdir(parents=True, exist_ok=True)
    inner = [path for path in tree(folder) if path.is_dir()]
    if problem := ownership.folder_problem(subject, folder, inner, may_be_hidden=True):
        if warns and not os.environ.get("HF_HUB_DISABLE_XET"):
            message = f"{problem.message}; files are downloaded without Xet, which can be slower"
            _warn_once(f"{message}; to use it, set HF_HOME to a folder of your own; or {problem.remedy}")
        constants.HF_HUB_DISABLE_XET = True


@functools.cache
def _warn_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def leads_outside(name: str) -> bool:
    """Return whether a name from a server would lead out of the folder to which it is appended.

    The client appends a commit unchanged, and an ETag without quotes and without its weak-validator prefix.
    """
    return name.startswith("/") or name.lstrip("W/").strip('"').startswith("/") or ".." in re.split(r'[/\\"]', name)


def _check(response: Any) -> None:
    """Reject an answer before the client uses it; called for each answer, before its content is read."""
    for header in _HEADERS:
        if leads_outside(value := response.headers.get(header, "")):
            raise _refusal(response, f"its header {header} names a file outside the cache", value)
    if (address := response.headers.get(_STORAGE)) and not address.startswith(("https://", "http://")):
        raise _refusal(response, f"its header {_STORAGE} names storage that is not a server", address)
    for header in _WAITS:
        if any(int(number[:9]) > _MAX_WAIT_S for number in re.findall(r"\d+", response.headers.get(header, ""))):
            del response.headers[header]
    if _JSON_PATH not in response.request.url.path:
        return
    # Keep what `read` would keep, within bounds.
    response._content = b"".join(_bounded(response))
    try:
        content = json.loads(response._content)
    except (ValueError, RecursionError):
        # Not JSON, for example an error page; the client reports this.
        return
    for key, value in _items(content):
        if key in _KEYS and leads_outside(value):
            raise _refusal(response, f"its {key} names a file outside the cache", value)


def _bounded(response: Any) -> Iterator[bytes]:
    num_bytes, until = 0, time.monotonic() + _MAX_JSON_S
    for piece in response.iter_bytes():
        num_bytes += len(piece)
        if num_bytes > _MAX_JSON_BYTES or time.monotonic() > until:
            limit = f"{_MAX_JSON_BYTES >> 20} MiB" if num_bytes > _MAX_JSON_BYTES else f"{_MAX_JSON_S:g} s"
            raise _refusal(response, f"its answer takes more than {limit}", "")
        yield piece


def _items(content: Any) -> Iterator[tuple[str, str]]:
    """Yield the keys whose values are strings, at any depth."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from ((key, inner) for key, inner in value.items() if isinstance(inner, str))
        if isinstance(value, dict | list):
            waiting += [inner for inner in (value.values() if isinstance(value, dict) else value) if not isinstance(inner, str)]


def _refusal(response: Any, reason: str, value: str) -> DataError:
    url = response.request.url
    return DataError(Problem(f"the answer of the Hub is rejected: {reason}", f"{url.scheme}://{url.host}", value[:200], _REMEDY))
