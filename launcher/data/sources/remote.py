"""Files at fsspec addresses, downloaded once into the launcher's cache."""

from __future__ import annotations

import glob
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.sections.data import RowSource
from launcher.data.cache_dir import convert_os_errors, is_full, mark_used, source_folder
from launcher.data.sources.files import DataFile, detect_kind, file_digest
from launcher.data.sources.row_values import refuse
from launcher.data.sources.splits import choose_files, list_unused
from launcher.errors import DataError, Problem
from launcher.locks import wait_and_hold
from launcher.security.redaction import redacted_command_line
from launcher.security.storage_addresses import access_remedy, require_known_hosts

# File metadata that changes with the content, by its names in various storages.
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "blob_id"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created"),
)
# By address: digests of files that this process downloaded because their storage has no such metadata.
_downloaded: dict[str, str] = {}


@dataclass(frozen=True)
class _FileVersion:
    """Identifies the content of a file: its size, if the storage reports it, and a `version` that changes with the content."""

    size: int | None
    version: str


class RemoteFiles:
    """A file, pattern or folder at an fsspec address; `list_unused` lists files of a folder that are not read.

    Methods raise DataError.
    """

    def __init__(self, source: RowSource) -> None:
        self._source = source
        self.left_out: tuple[str, ...] = ()
        self._fs, path = self._try("opened", lambda: _connect(source.path))
        # Another process may have written files since the last listing.
        self._fs.invalidate_cache()
        self._paths = self._try("listed", lambda: self._list(path))
        if not self._paths:
            refuse("no file matches the pattern", source.path, "check the address")
        self._states = [self._state(path) for path in self._paths]

    def _list(self, path: str) -> list[str]:
        before_query = path.partition("?")[0]
        if path.startswith(("http://", "https://")) and detect_kind(before_query) and not glob.has_magic(before_query):
            # fsspec would read the file for links to find out whether it is a folder.
            return [path]
        if glob.has_magic(path):
            return sorted(name for name in self._fs.glob(path) if self._fs.isfile(name))
        if not self._fs.isdir(path):
            return [path]
        root = path.rstrip("/")
        names = [str(name).removeprefix(f"{root}/") for name in self._fs.find(root)]
        source = self._source
        chosen = choose_files(
            names, lambda name: bytes(self._fs.cat_file(f"{root}/{name}")), source.subset, source.split, source.path
        )
        self.left_out = list_unused(names, chosen)
        return [f"{root}/{name}" for name in chosen]

    def _state(self, path: str) -> _FileVersion:
        info: dict[str, Any] = self._try("found", lambda: self._fs.info(path))
        size = info.get("size")
        if size == 0:
            refuse("the data file is empty", self._name(path), "add rows to it")
        version = next((f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key) is not None), None)
        return _FileVersion(size, version or self._download_digest(path, size))

    def _name(self, path: str) -> str:
        return str(self._fs.unstrip_protocol(path))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._name(path) for path in self._paths)

    def digest(self) -> str:
        """Return a text that changes with the content of the files."""
        states = zip(self._paths, self._states, strict=True)
        return json.dumps([(self._name(path), state.size, state.version) for path, state in states])

    def fetch(self) -> tuple[DataFile, ...]:
        """Download the files that are not in the cache; return all files."""
        return tuple(self._fetch(path, state) for path, state in zip(self._paths, self._states, strict=True))

    def _fetch(self, path: str, state: _FileVersion) -> DataFile:
        target = self._target(path, state)
        with convert_os_errors(target.parent):
            if not target.exists():
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with wait_and_hold(target.parent / ".lock", f"fetches {self._name(path)}", redacted_command_line()):
                    if not target.exists():
                        self._download(path, state.size, target.parent).replace(target)
            mark_used(target.parent)
        return DataFile(target, self._name(path))

    def _download_digest(self, path: str, size: int | None) -> str:
        """Download a file without version metadata, once per process; return the digest of its content."""
        name = self._name(path)
        if name not in _downloaded:
            folder = source_folder("address", name)
            with convert_os_errors(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                partial = self._download(path, size, folder)
                digest = file_digest(DataFile(partial, name))
                target = self._target(path, _FileVersion(size, digest))
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                partial.replace(target)
            _downloaded[name] = digest
        return _downloaded[name]

    def _target(self, path: str, state: _FileVersion) -> Path:
        # Do not use the address as the name, because it may be longer than a file name can be.
        return source_folder("address", self._name(path), state.size, state.version) / "rows"

    def _download(self, path: str, size: int | None, folder: Path) -> Path:
        """Download the file to a temporary name in `folder`; remove it if that fails."""
        partial = folder / f".{secrets.token_hex(4)}"
        try:
            self._try("fetched", lambda: self._fs.get_file(path, str(partial)))
            num_bytes = partial.stat().st_size
            if num_bytes == 0 or (size is not None and num_bytes != size):
                message = f"the download is empty or incomplete: {num_bytes:,} of {num_bytes if size is None else size:,} bytes"
                refuse(message, self._name(path), "try again when no program is writing the file")
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return partial

    def _try(self, done: str, action: Callable[[], Any]) -> Any:
        path, remedy = self._source.path, access_remedy(self._source.path)
        try:
            return action()
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(Problem("there is no such data file", path, remedy=remedy)) from error
        except ImportError as error:
            protocol = path.split("://")[0]
            message = f"the package that reads {protocol}:// is not installed: {error}"
            raise DataError(Problem(message, path, remedy=f"pip install {_missing_package(error)}")) from error
        except Exception as error:
            if isinstance(error, OSError) and is_full(error):
                raise
            message = f"the data cannot be {done}: {type(error).__name__}: {str(error)[:200]}"
            raise DataError(Problem(message, path, remedy=remedy)) from error


def _missing_package(error: ImportError) -> str:
    """Return the package to install: fsspec's error is caused by the import error that names the module."""
    missing = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    return (missing.name or str(missing)).partition(".")[0]


def _connect(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    require_known_hosts(url)
    fs, path = url_to_fs(url)
    return fs, str(path)
