"""Locates the files of a source: local files, folders and patterns, Hub datasets, fsspec addresses.

Remote files are downloaded once: Hub files into huggingface_hub's cache, others into the launcher's.
"""

from __future__ import annotations

import functools
import glob
import json
import logging
import os
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from launcher import atomic_files
from launcher.config.sections.data import RowSource
from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.data import hub_cache
from launcher.data.cache_dir import convert_os_errors, source_folder
from launcher.data.sources.files import DataFile, SourceFiles, detect_kind, file_digest
from launcher.data.sources.remote import find_remote
from launcher.data.sources.row_values import refuse
from launcher.data.sources.splits import choose_files
from launcher.errors import DataError, Problem

_COMMIT_DIGITS = 40
_HUB_TIMEOUT_S = 20.0
# Too many requests, and server errors.
_TEMPORARY = (429, *range(500, 600))
_NUM_NAMES = 10


def is_url(path: str) -> bool:
    """Return True for an address with a protocol, such as s3://."""
    return "://" in path


def is_hub(path: str) -> bool:
    """Return True for owner/name, unless it is a local file or folder, or has the name of a data file."""
    return HUB_ID_PATTERN.fullmatch(path) is not None and detect_kind(path) is None and not Path(path).exists()


def has_splits(path: str) -> bool:
    """Return True for a folder, a Hub dataset or an address; files named by a path or a pattern have no splits."""
    return is_url(path) or is_hub(path) or Path(path).expanduser().is_dir()


def find_files(source: RowSource) -> SourceFiles:
    """Find the files of the source; lists remote ones. Raises DataError."""
    if is_url(source.path):
        return find_remote(source)
    return _find_on_hub(source) if is_hub(source.path) else _find_local(source)


def describe_origin(source: RowSource) -> dict[str, Any]:
    """Return the origin of the source's rows: a digest, the commit of a Hub dataset, and the files that are read and left out.

    Lists up to ten names of each. Raises DataError.
    """
    files = find_files(source)
    return {
        "digest": xxhash.xxh3_128_hexdigest(files.digest().encode()),
        "commit": files.commit,
        "files": list(files.names[:_NUM_NAMES]),
        "num_files": len(files.names),
        "left_out": list(files.left_out[:_NUM_NAMES]),
        "num_left_out": len(files.left_out),
    }


def local_problem(key: str, source: RowSource) -> Problem | None:
    """Check a local path on disk and return its problem; `key` is its setting."""
    value, path = source.path, Path(source.path).expanduser()
    remedy = f"set {key} to a data file, a folder, a pattern, a Hub dataset (owner/name) or an address (s3://...)"
    if glob.has_magic(value) and not path.exists():
        if not _match_pattern(value):
            return Problem("no file matches the pattern", key, value, f"{remedy}; relative paths start at {Path.cwd()}")
    elif not path.is_file() and not path.is_dir():
        return Problem("there is no such data file or folder", key, value, f"{remedy}; relative paths start at {Path.cwd()}")
    if not path.is_dir() and (source.split, source.subset, source.revision) != (None, None, None):
        return Problem("split, subset and revision do not apply to a path that names files", key, value, "remove them")
    try:
        files = _find_local(source).fetch()
    except DataError as error:
        (problem,) = error.problems
        return Problem(problem.message, key, value, problem.remedy)
    empty = [file.name for file in files if file.path.stat().st_size == 0]
    which = "" if empty == [value] else f": {', '.join(empty[:3])}"
    return Problem(f"the data file is empty{which}", key, value, "add rows to it, or remove it") if empty else None


def _find_local(source: RowSource) -> SourceFiles:
    path = Path(source.path).expanduser()
    files: tuple[DataFile, ...] = (DataFile(path, source.path),)
    left_out: tuple[str, ...] = ()
    if path.is_dir():
        chosen, left_out = choose_files(
            _list_names(path), lambda name: (path / name).read_bytes(), source.subset, source.split, source.path
        )
        files = tuple(DataFile(path / name, f"{source.path.rstrip('/')}/{name}") for name in chosen)
    elif glob.has_magic(source.path) and not path.exists():
        files = tuple(DataFile(Path(name), name) for name in _match_pattern(source.path))
    return SourceFiles(
        tuple(file.name for file in files),
        left_out,
        None,
        lambda: ", ".join(f"{detect_kind(file.name)} {file_digest(file)}" for file in files),
        lambda: files,
    )


def _list_names(folder: Path) -> list[str]:
    """Return the files below `folder`, following links; a folder that several links lead to is listed once."""
    names, seen = [], set()

    def refuse_folder(error: OSError) -> NoReturn:
        message = f"the folder {error.filename} cannot be read: {error.strerror}"
        refuse(message, str(error.filename), "check its permissions and the disk")

    for parent, folders, files in os.walk(folder, onerror=refuse_folder, followlinks=True):
        # Folders themselves come before links to them.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        names += [Path(parent, name).relative_to(folder).as_posix() for name in files if Path(parent, name).is_file()]
    return sorted(names)


def _match_pattern(pattern: str) -> list[str]:
    paths = glob.iglob(os.path.expanduser(pattern), recursive=True)
    return sorted(name for name in paths if Path(name).is_file())


# Hub datasets


def _find_on_hub(source: RowSource) -> SourceFiles:
    commit, names, left_out = _hub_listing(source)

    def fetch(name: str) -> DataFile:
        try:
            return DataFile(hub_cache.fetch_dataset_file(source.path, name, commit), f"{source.path}/{name}")
        except DataError:
            raise
        except Exception as error:
            why = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
            raise _unreachable(source, f"{name} cannot be fetched: {type(error).__name__}{why}") from error

    return SourceFiles(
        names, left_out, commit, lambda: f"{source.path}@{commit}: {', '.join(names)}", lambda: tuple(map(fetch, names))
    )


def _hub_listing(source: RowSource) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return the commit, the files of the source's subset and split, and the files left out.

    The Hub is queried unless the revision is a commit with a stored listing. If the Hub cannot be reached or is too busy, the
    last stored listing is returned.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    record = source_folder("hub", source.path, source.revision, source.subset, source.split) / "listing.json"
    if len(source.revision or "") == _COMMIT_DIGITS and (stored := _read_listing(record)):
        return stored
    try:
        info = HfApi().dataset_info(source.path, revision=source.revision, timeout=_HUB_TIMEOUT_S)
        commit, names = str(info.sha), [sibling.rfilename for sibling in info.siblings or ()]

        def read(name: str) -> bytes:
            return hub_cache.fetch_dataset_file(source.path, name, commit).read_bytes()

        chosen, left_out = choose_files(names, read, source.subset, source.split, source.path)
    except DataError:
        raise
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        # The error's name tells a missing dataset, whose status is 401 or 404, from a missing revision and a gated dataset.
        reason = f"the hub answered with {status}" if status else "the hub cannot be reached"
        reason += f" ({type(error).__name__})"
        if (not status or status in _TEMPORARY) and (stored := _read_listing(record)):
            _warn_once(f"{reason}; {source.path} is read at the last known commit {stored[0]}")
            return stored
        raise _unreachable(source, reason) from error
    with convert_os_errors(record.parent):
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_files.write_json(record, {"commit": commit, "files": chosen, "left_out": left_out})
    return commit, chosen, left_out


@functools.cache
def _warn_once(text: str) -> None:
    # Without a logging handler, a warning goes to standard error.
    logging.getLogger(__name__).warning(text)


def _read_listing(record: Path) -> tuple[str, tuple[str, ...], tuple[str, ...]] | None:
    try:
        listing = json.loads(record.read_bytes())
    except FileNotFoundError:
        return None
    return listing["commit"], tuple(listing["files"]), tuple(listing["left_out"])


def _unreachable(source: RowSource, reason: str) -> DataError:
    message = f"there is no file or folder {source.path} here, and the hub dataset of that name cannot be used: {reason}"
    remedy = (
        f"a local folder: write ./ before it, and create it (relative paths start at {Path.cwd()}); "
        "a hub dataset: check the name, the revision and the network, and HF_TOKEN in the environment for a private or gated one"
    )
    revision = f"revision={source.revision}" if source.revision else ""
    return DataError(Problem(message, source.path, revision, remedy))
