"""Files at fsspec addresses, downloaded once into the launcher's cache."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.config.sections.data import RowSource
from launcher.data.cache_dir import convert_os_errors, is_full, mark_used, source_folder
from launcher.data.sources.files import DataFile, SourceFiles, detect_kind
from launcher.data.sources.row_values import refuse
from launcher.data.sources.splits import choose_files
from launcher.errors import DataError, Problem
from launcher.locks import wait_and_hold
from launcher.security.redaction import redacted_command_line
from launcher.security.storage_addresses import access_remedy, require_known_hosts

# File metadata that changes with the content, by its names in various storages.
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "blob_id", "sha", "CRC"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "modificationTime", "updated", "created"),
)


def find_remote(source: RowSource) -> SourceFiles:
    """Find the file, or the files of a pattern or folder, at an fsspec address. Raises DataError."""
    with _converted_errors(source.path):
        from fsspec.core import url_to_fs

        require_known_hosts(source.path)
        fs, path = url_to_fs(source.path)
        # Another process may have written files since the last listing.
        fs.invalidate_cache()
        paths, left_out = _list(fs, str(path), source)
        versions = {path: _read_version(fs, path) for path in paths}
    if not paths:
        refuse("no file matches the pattern", source.path, "check the address")
    return SourceFiles(
        tuple(name for name, _, _ in versions.values()),
        left_out,
        None,
        lambda: json.dumps([*versions.values()]),
        lambda: tuple(_fetch(fs, path, *version) for path, version in versions.items()),
    )


def _list(fs: Any, path: str, source: RowSource) -> tuple[list[str], tuple[str, ...]]:
    """Return the paths of the files to read, and the names of files of the folder that are left out."""
    before_query = path.partition("?")[0]
    if path.startswith(("http://", "https://")) and detect_kind(before_query) and not glob.has_magic(before_query):
        # fsspec would read the file for links to find out whether it is a folder.
        return [path], ()
    if glob.has_magic(path):
        return sorted(name for name in fs.glob(path) if fs.isfile(name)), ()
    if not fs.isdir(path):
        return [path], ()
    root = path.rstrip("/")
    names = [str(name).removeprefix(f"{root}/") for name in fs.find(root)]
    chosen, left_out = choose_files(
        names, lambda name: bytes(fs.cat_file(f"{root}/{name}")), source.subset, source.split, source.path
    )
    return [f"{root}/{name}" for name in chosen], left_out


def _read_version(fs: Any, path: str) -> tuple[str, int | None, str]:
    """Return a file's address, its size if the storage reports it, and a text that changes with its content."""
    name, info = str(fs.unstrip_protocol(path)), fs.info(path)
    size = info.get("size")
    if size == 0:
        refuse("the data file is empty", name, "add rows to it")
    version = next((f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key) is not None), None)
    if version is None:
        refuse("the storage does not tell when this file changes", name, "download it, and set the source's path to the copy")
    return name, size, version


def _fetch(fs: Any, path: str, name: str, size: int | None, version: str) -> DataFile:
    """Download a file that is not in the cache."""
    # Do not use the address as the name, because it may be longer than a file name can be.
    folder = source_folder("address", name, size, version)
    target = folder / "rows"
    with convert_os_errors(folder):
        if not target.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with wait_and_hold(folder / ".lock", f"fetches {name}", redacted_command_line()):
                if not target.exists():
                    _download(fs, path, target, name, size)
        mark_used(folder)
    return DataFile(target, name)


def _download(fs: Any, path: str, target: Path, name: str, size: int | None) -> None:
    partial = target.with_suffix(".partial")
    try:
        with _converted_errors(name):
            fs.get_file(path, str(partial))
        num_bytes = partial.stat().st_size
        if num_bytes == 0 or (size is not None and num_bytes != size):
            message = f"the download is empty or incomplete: {num_bytes:,} of {size or num_bytes:,} bytes"
            refuse(message, name, "try again when no program is writing the file")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _converted_errors(address: str) -> Iterator[None]:
    """Convert the many types of exceptions that clients of storages raise."""
    remedy = access_remedy(address)
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(Problem("there is no such data file", address, remedy=remedy)) from error
    except Exception as error:
        if isinstance(error, OSError) and is_full(error):
            raise
        message = f"the data cannot be read: {type(error).__name__}: {str(error)[:200]}"
        raise DataError(Problem(message, address, remedy=remedy)) from error
