"""A folder at an fsspec URL, with atomic writes and retries.

Credentials and endpoints come from the environment, as the storage's own tools read them; fsspec's variables (FSSPEC_S3_...)
set the rest.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity
import xxhash
from fsspec.implementations.local import LocalFileSystem

from launcher.errors import LauncherError, SubmitError, describe
from launcher.runs.atomic_files import FileEntry
from launcher.security import folders
from launcher.security.connections import access_remedy, require_known_hosts

T = TypeVar("T")

_BLOCK_BYTES = 16 * 2**20
# S3 accepts at most 10,000 parts per upload.
_MAX_BLOCKS = 9000
# Waits between tries after a possibly transient failure; after the last one, the next checkpoint tries again.
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
# Errors that would repeat in a retry.
_PERMANENT = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError),
    LauncherError,
)
# Object stores: an object appears when its upload is complete, and a rename is a copy. Elsewhere a file grows under its name.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "obs", "tos", "cos"}


class RemoteFolder:
    """The folder at `url`. Names are relative to it, with slashes. Methods retry, then raise the storage's own error.

    `origin` is where the user wrote the address, for errors.

    Raises:
        SubmitError: if the package for this kind of address is not installed, the address is invalid, or a client that
            connects at once, such as sftp's, cannot.
    """

    def __init__(self, url: str, waits_s: tuple[float, ...] = _WAITS_S, origin: str = "checkpoint.mirror") -> None:
        self.url, self.origin = url.rstrip("/"), origin
        self._waits_s = waits_s
        require_known_hosts(url)
        with convert_storage_errors(self, "reached"):
            self._connect()
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else tuple(self._fs.protocol)
        self._is_object_store = bool(_OBJECT_STORES.intersection(protocols))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, None if it does not exist."""
        with suppress(FileNotFoundError):
            return self._retry(lambda: bytes(self._fs.cat_file(self._path(name))))
        return None

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names in a folder; empty if it does not exist."""
        with suppress(FileNotFoundError):
            paths = self._retry(lambda: [str(path) for path in self._fs.ls(self._path(folder), detail=False)])
            return sorted(name for path in paths if (name := path.rstrip("/").rpartition("/")[2]))
        return []

    def write(self, name: str, content: bytes) -> FileEntry:
        """Write or replace a small file; return its size and digest."""
        return self._retry(lambda: self._put(name, [content], len(content)))

    def send(self, name: str, source: Path) -> FileEntry:
        """Upload a local file, block by block; return size and digest of what was sent."""

        def put() -> FileEntry:
            with open(source, "rb", buffering=0) as file:
                return self._put(name, iter(partial(file.read, _BLOCK_BYTES), b""), source.stat().st_size)

        return self._retry(put)

    def receive(self, name: str, target: Path, on_read: Callable[[int], None] = lambda num_bytes: None) -> FileEntry:
        """Download a file, block by block, and fsync it, replacing `target`; return size and digest of what arrived.

        `on_read` is called with the number of bytes of each block, and again if the file is fetched again.
        """

        def get() -> FileEntry:
            digest, size = xxhash.xxh3_128(), 0
            with self._fs.open(self._path(name), "rb", block_size=_BLOCK_BYTES) as source, open(target, "wb") as file:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    size += file.write(block)
                    on_read(len(block))
                file.flush()
                os.fsync(file.fileno())
            return FileEntry(size=size, xxh3_128=digest.hexdigest())

        return self._retry(get)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with suppress(FileNotFoundError):
            self._retry(lambda: self._fs.rm_file(self._path(name)))

    def remove_folder(self, name: str, first: str) -> None:
        """Remove a folder with its content if it exists, the file `first` before all others."""
        self.remove(f"{name}/{first}")
        with suppress(FileNotFoundError):
            self._retry(lambda: self._fs.rm(self._path(name), recursive=True))

    def require_trusted(self) -> None:
        """Reject a folder on a disk whose content other users could have changed: a resume runs code from it."""
        folder = Path(self._root)
        if isinstance(self._fs, LocalFileSystem) and (problem := folders.folder_problem(f"the mirror of {folder.name}", folder)):
            raise SubmitError(problem)

    def _connect(self, **options: Any) -> None:
        fs, root = fsspec.core.url_to_fs(self.url, **options)
        self._fs: Any = fs
        self._root = str(root).rstrip("/")

    def _retry(self, action: Callable[[], T]) -> T:
        """Repeat an action after a possibly transient failure: storage raises many exception types for "not now"."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, _PERMANENT)),
            stop=tenacity.stop_after_attempt(len(self._waits_s) + 1),
            wait=tenacity.wait_chain(*map(tenacity.wait_fixed, (*self._waits_s, 0.0))),
            reraise=True,
        )

        def act() -> T:
            if retrying.statistics["attempt_number"] > 1:
                # A client of sftp does not connect again after its connection has ended.
                self._connect(skip_instance_cache=True)
            # Opening a file relies on an earlier listing.
            self._fs.invalidate_cache()
            return action()

        return retrying(act)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _put(self, name: str, blocks: Iterable[bytes], size: int) -> FileEntry:
        target = self._path(name)
        if self._is_object_store:
            return self._write_blocks(target, blocks, size)
        folder, _, base = target.rpartition("/")
        self._fs.makedirs(folder, exist_ok=True)
        # Two processes may write the same file for a moment, until the earlier one knows of the other.
        unfinished = f"{folder}/.unfinished-{secrets.token_hex(4)}-{base}"
        try:
            entry = self._write_blocks(unfinished, blocks, size)
            self._fs.mv(unfinished, target)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(unfinished)
            raise
        return entry

    def _write_blocks(self, path: str, blocks: Iterable[bytes], size: int) -> FileEntry:
        digest, sent = xxhash.xxh3_128(), 0
        file = self._fs.open(path, "wb", block_size=max(_BLOCK_BYTES, -(-size // _MAX_BLOCKS)))
        try:
            for block in blocks:
                digest.update(block)
                file.write(block)
                sent += len(block)
            if not self._is_object_store:
                file.flush()
                # A network file system reports a full disk only now.
                with suppress(AttributeError, io.UnsupportedOperation):
                    os.fsync(file.f.fileno())
            file.close()
        except BaseException:
            with suppress(Exception):
                if self._is_object_store:
                    # Closing a file of an object store, even by garbage collection, completes its upload.
                    file.discard()
                    file.closed = True
                else:
                    file.close()
            raise
        return FileEntry(size=sent, xxh3_128=digest.hexdigest())


def require_writable(url: str) -> None:
    """Check that the folder can be written, by writing and removing a small file.

    Raises:
        SubmitError: if it cannot; holds the storage's message.
    """
    # No retries: the user is waiting and can repeat the command.
    remote = RemoteFolder(url, waits_s=())
    name = f".probe-{secrets.token_hex(8)}"
    with convert_storage_errors(remote, "written"):
        remote.write(name, b"launcher\n")
        remote.remove(name)


@contextmanager
def convert_storage_errors(remote: RemoteFolder, operation: str) -> Iterator[None]:
    """Convert the storage's own errors to a SubmitError with a remedy; `operation` completes "the mirror cannot be"."""
    try:
        yield
    except LauncherError:
        raise
    except Exception as error:
        remedy = (
            "check that the folder can be created and written" if remote.url.startswith("file:") else access_remedy(remote.url)
        )
        reason = describe(error).partition("\n")[0]
        raise SubmitError(
            f"the mirror cannot be {operation}: {reason}", where=remote.origin, value=remote.url, remedy=remedy
        ) from error
