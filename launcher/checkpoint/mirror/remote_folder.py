"""A folder at an fsspec URL, with what storage does not give by itself: files that are whole or not there, and patience.

Credentials and endpoints come from the environment, as the storage's own tools read them; fsspec's variables (FSSPEC_S3_...)
set the rest.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity
import xxhash
from fsspec.registry import known_implementations

from launcher.atomic_files import FileEntry
from launcher.errors import SubmitError

T = TypeVar("T")

_BLOCK_BYTES = 16 * 2**20
# S3 takes an upload of at most 10,000 parts.
_MOST_BLOCKS = 9000
# Waits between tries of what may have failed for a moment; what fails longer is tried again at the next checkpoint.
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
# Another try would end in the same way.
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError)
# An object appears when it is whole, and a rename would be a copy. Everywhere else a file grows under its name.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "obs", "tos", "cos"}
_UNFINISHED = ".unfinished-"


class RemoteFolder:
    """The folder at `url`. Names are relative to it, with slashes. Methods raise what the storage raises, after some patience.

    Raises:
        SubmitError: where the package for this kind of address is missing, or the address is none.
    """

    def __init__(self, url: str, waits_s: tuple[float, ...] = _WAITS_S) -> None:
        self.url = url.rstrip("/")
        self._waits_s = waits_s
        self._fs, root = _connect(self.url)
        self._root = root.rstrip("/")
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else tuple(self._fs.protocol)
        self._is_object_store = bool(_OBJECT_STORES.intersection(protocols))

    def under(self, name: str) -> RemoteFolder:
        """The folder `name` within this one."""
        inner = object.__new__(RemoteFolder)
        inner.__dict__.update(self.__dict__, url=f"{self.url}/{name}", _root=self._path(name))
        return inner

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        try:
            content: bytes = self._retry(lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        return content

    def size(self, name: str) -> int | None:
        """Bytes of a file as the storage tells them now; None where there is none."""

        def ask() -> int:
            self._fs.invalidate_cache()
            return int(self._fs.info(self._path(name))["size"])

        try:
            return self._retry(ask)
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        """What lies in a folder, sorted; empty where there is no such folder."""

        def ask() -> list[str]:
            self._fs.invalidate_cache()
            return [str(found) for found in self._fs.ls(self._path(folder), detail=False)]

        try:
            found = self._retry(ask)
        except FileNotFoundError:
            return []
        return sorted(name for path in found if (name := path.rstrip("/").rpartition("/")[2]))

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a small file."""
        self._retry(lambda: self._put(name, lambda: [content], len(content)))

    def send(self, name: str, source: Path, size: int) -> FileEntry:
        """Copy the first `size` bytes of a local file, block by block; returns what was sent of it."""

        def put() -> FileEntry:
            with open(source, "rb", buffering=0) as file:
                return self._put(name, lambda: _blocks(file, size), size)

        return self._retry(put)

    def receive(self, name: str, target: Path) -> FileEntry:
        """Copy a file to a local path that does not exist, block by block; returns what arrived."""

        def get() -> FileEntry:
            digest, size = xxhash.xxh3_128(), 0
            target.unlink(missing_ok=True)
            with self._fs.open(self._path(name), "rb", block_size=_BLOCK_BYTES) as source, open(target, "xb") as file:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    size += file.write(block)
                file.flush()
                os.fsync(file.fileno())
            return FileEntry(size=size, xxh3_128=digest.hexdigest())

        return self._retry(get)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self._retry(lambda: self._fs.rm_file(self._path(name)))

    def remove_folder(self, name: str, first: str) -> None:
        """Remove a folder and all in it, the file `first` before all others."""
        self.remove(f"{name}/{first}")
        with suppress(FileNotFoundError):
            self._retry(lambda: self._fs.rm(self._path(name), recursive=True))

    def _retry(self, action: Callable[[], T]) -> T:
        """Run an action again after a failure that may be transient: storages raise many types for "not now"."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, _PERMANENT)),
            stop=tenacity.stop_after_attempt(len(self._waits_s) + 1),
            wait=tenacity.wait_chain(*map(tenacity.wait_fixed, (*self._waits_s, 0.0))),
            reraise=True,
        )
        return retrying(action)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _put(self, name: str, blocks: Callable[[], Iterable[bytes]], size: int) -> FileEntry:
        target = self._path(name)
        if self._is_object_store:
            return self._write_blocks(target, blocks(), size)
        folder, _, base = target.rpartition("/")
        self._fs.makedirs(folder, exist_ok=True)
        # A process that was killed in between leaves this name, which nobody takes for the file.
        unfinished = f"{folder}/{_UNFINISHED}{base}"
        entry = self._write_blocks(unfinished, blocks(), size)
        self._fs.mv(unfinished, target)
        return entry

    def _write_blocks(self, path: str, blocks: Iterable[bytes], size: int) -> FileEntry:
        digest, sent = xxhash.xxh3_128(), 0
        file = self._fs.open(path, "wb", block_size=max(_BLOCK_BYTES, -(-size // _MOST_BLOCKS)))
        try:
            for block in blocks:
                digest.update(block)
                file.write(block)
                sent += len(block)
            if not self._is_object_store:
                file.flush()
                # A network file system tells of a full disk only now.
                with suppress(AttributeError, io.UnsupportedOperation):
                    os.fsync(file.f.fileno())
            file.close()
        except BaseException:
            _abandon(file, self._is_object_store)
            raise
        return FileEntry(size=sent, xxh3_128=digest.hexdigest())


def require_writable(url: str) -> None:
    """Write and remove a small file in the folder.

    Raises:
        SubmitError: where that is not possible, with the storage's own words.
    """
    # A person waits, and can ask again.
    remote = RemoteFolder(url, waits_s=())
    name = f".probe-{secrets.token_hex(8)}"
    try:
        remote.write(name, b"launcher\n")
        remote.remove(name)
    except Exception as error:
        raise unreachable_error(remote, "written", error) from error


def unreachable_error(remote: RemoteFolder, what: str, error: Exception) -> SubmitError:
    """`what` is read or written."""
    remedy = "check the address, and the storage's credentials in the environment"
    if remote.url.startswith("s3:"):
        remedy += " (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; another endpoint: AWS_ENDPOINT_URL)"
    elif remote.url.startswith("file:"):
        remedy = "check that the folder can be made and written"
    return SubmitError(
        f"the mirror cannot be {what}: {describe_error(error)}", where="checkpoint.mirror", value=remote.url, remedy=remedy
    )


def describe_error(error: Exception) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _connect(url: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SubmitError(
            f"addresses that start with {url.partition('://')[0]}:// need a Python package that is not installed",
            where="checkpoint.mirror",
            value=url,
            remedy=f"install it where the launcher is installed, with: pip install {_package(url, error)}",
        ) from None
    except ValueError as error:
        known = ", ".join(name for name in ("s3", "gs", "az", "hf", "sftp", "file"))
        raise SubmitError(
            f"this is no address of a mirror: {error}",
            where="checkpoint.mirror",
            value=url,
            remedy=f"it starts with one of: {known}",
        ) from None
    return fs, str(path)


def _package(url: str, error: ImportError) -> str:
    """The distribution that brings a protocol: fsspec knows the class, and the distribution has its module's name."""
    protocol = url.partition("://")[0]
    module = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
    if module not in ("", "fsspec"):
        return module.replace("_", "-")
    missing = getattr(error.__cause__ or error, "name", None)
    return missing or f"'fsspec[{protocol}]'"


def _blocks(file: io.RawIOBase, size: int) -> Iterator[bytes]:
    left = size
    while left and (block := file.read(min(_BLOCK_BYTES, left))):
        left -= len(block)
        yield block


def _abandon(file: Any, is_object_store: bool) -> None:
    """Leave a write so that nothing of it appears: an object that is closed, be it by the garbage collector, is complete."""
    with suppress(Exception):
        if is_object_store:
            file.discard()
            file.closed = True
        else:
            file.close()
