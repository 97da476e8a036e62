"""A folder at an fsspec URL, with atomic writes and retries.

Credentials and endpoints come from the environment, as the storage's own tools read them; fsspec's variables (FSSPEC_S3_...)
set the rest.
"""

from __future__ import annotations

import functools
import io
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import tenacity
import xxhash
from fsspec.implementations.local import LocalFileSystem

from launcher import json_records
from launcher.atomic_files import FileEntry
from launcher.checkpoint.mirror.storage_connection import connect, reconnect, require_own_listener, unreachable_error
from launcher.errors import CheckpointError, LauncherError, SubmitError
from launcher.security import ownership
from launcher.security.path_steps import entry_in_open_folder
from launcher.security.permissions import tree
from launcher.security.trust import FLAG, user_name

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
_UNFINISHED = ".unfinished-"
_NUM_RANDOM_BYTES = 8


class RemoteFolder:
    """The folder at `url`. Names are relative to it, with slashes. Methods retry, then raise the storage's own error.

    `origin` is where the user wrote the address, for errors.

    Raises:
        SubmitError: if the package for this kind of address is not installed, or the address is invalid.
    """

    def __init__(self, url: str, waits_s: tuple[float, ...] = _WAITS_S, origin: str = "checkpoint.mirror") -> None:
        self.url, self.origin = url.rstrip("/"), origin
        self._waits_s = waits_s
        self._fs, root = connect(self.url, origin)
        self._root = root.rstrip("/")
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else tuple(self._fs.protocol)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._is_object_store = bool(_OBJECT_STORES.intersection(protocols))

    def under(self, name: str) -> RemoteFolder:
        """Return the subfolder `name`."""
        inner = object.__new__(RemoteFolder)
        inner.__dict__.update(self.__dict__, url=f"{self.url}/{name}", _root=self._path(name))
        return inner

    def read(self, name: str, max_bytes: int = json_records.MAX_BYTES) -> bytes | None:
        """Return the content of a small file, None if it does not exist.

        Raises:
            CheckpointError: if it has more than `max_bytes`, or is not a regular file.
        """

        def get() -> bytes:
            # Opening a file relies on an earlier listing.
            self._fs.invalidate_cache()
            with self._fs.open(self._regular_file(name), "rb", block_size=_BLOCK_BYTES) as file:
                return b"".join(_blocks(file, max_bytes + 1))

        try:
            content = self._retry(get)
        except FileNotFoundError:
            return None
        if len(content) > max_bytes:
            message = f"a file of the mirror has more than {max_bytes >> 20} MiB, the limit for such a file"
            raise CheckpointError(message, where=f"{self.url}/{name}")
        return content

    def size(self, name: str) -> int | None:
        """Return the present size of a file in bytes, None if it does not exist."""

        def query() -> int:
            self._fs.invalidate_cache()
            return int(self._fs.info(self._path(name))["size"])

        try:
            return self._retry(query)
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names in a folder; empty if it does not exist."""

        def query() -> list[str]:
            self._fs.invalidate_cache()
            return [str(path) for path in self._fs.ls(self._path(folder), detail=False)]

        try:
            paths = self._retry(query)
        except FileNotFoundError:
            return []
        return sorted(name for path in paths if (name := path.rstrip("/").rpartition("/")[2]))

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a small file."""
        self._retry(lambda: self._put(name, lambda: [content], len(content)))

    def send(self, name: str, source: Path, size: int) -> FileEntry:
        """Upload the first `size` bytes of a local file, block by block; return size and digest of what was sent."""

        def put() -> FileEntry:
            with open(source, "rb", buffering=0) as file:
                return self._put(name, lambda: _blocks(file, size), size)

        return self._retry(put)

    def send_open(self, name: str, source: io.RawIOBase, size: int) -> FileEntry:
        """Upload the first `size` bytes of an open file; see `send`."""

        def put() -> FileEntry:
            source.seek(0)
            return self._put(name, lambda: _blocks(source, size), size)

        return self._retry(put)

    def receive(
        self,
        name: str,
        target: Path,
        on_read: Callable[[int], None] = lambda num_bytes: None,
        max_bytes: int | None = None,
    ) -> FileEntry:
        """Download a file, block by block, and fsync it, replacing `target`; return size and digest of what arrived.

        `on_read` is called with the number of bytes of each block, and again if the file is fetched again. If the file exceeds
        `max_bytes`, at most one more block is fetched.

        Raises:
            CheckpointError: if it is not a regular file.
        """

        def get() -> FileEntry:
            digest, size = xxhash.xxh3_128(), 0
            target.unlink(missing_ok=True)
            path = self._regular_file(name)
            with self._fs.open(path, "rb", block_size=_BLOCK_BYTES) as source, open(target, "xb") as file:
                while (max_bytes is None or size <= max_bytes) and (block := source.read(_BLOCK_BYTES)):
                    digest.update(block)
                    size += file.write(block)
                    on_read(len(block))
                file.flush()
                os.fsync(file.fileno())
            return FileEntry(size=size, xxh3_128=digest.hexdigest())

        return self._retry(get)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""

        def remove_file() -> None:
            with self._path_to_change(name) as path:
                self._fs.rm_file(path)

        with suppress(FileNotFoundError):
            self._retry(remove_file)

    def remove_folder(self, name: str, first: str) -> None:
        """Remove a folder with its content, the file `first` before all others."""

        def remove_all() -> None:
            with self._path_to_change(name) as path:
                self._fs.rm(path, recursive=True)

        self.remove(f"{name}/{first}")
        with suppress(FileNotFoundError):
            self._retry(remove_all)

    def _retry(self, action: Callable[[], T]) -> T:
        """Repeat an action after a possibly transient failure: storage raises many exception types for "not now".

        During a run, an ssh tunnel may end, and another user may take its port.
        """

        def act() -> T:
            require_own_listener(self.url, self.origin)
            reconnect(self._fs)
            return action()

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, _PERMANENT)),
            stop=tenacity.stop_after_attempt(len(self._waits_s) + 1),
            wait=tenacity.wait_chain(*map(tenacity.wait_fixed, (*self._waits_s, 0.0))),
            reraise=True,
        )
        return retrying(act)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _put(self, name: str, blocks: Callable[[], Iterable[bytes]], size: int) -> FileEntry:
        if self._is_object_store:
            return self._write_blocks(self._path(name), blocks(), size)
        with self._path_to_change(name, make_folder=True) as target:
            folder, _, base = target.rpartition("/")
            self._fs.makedirs(folder, exist_ok=True)
            self._remove_leftovers(folder, base)
            # A killed process leaves a file of this name: no reader mistakes it for the file, and nobody can guess and occupy it
            # in advance.
            unfinished = f"{folder}/{_UNFINISHED}{secrets.token_hex(_NUM_RANDOM_BYTES)}-{base}"
            entry = self._write_blocks(unfinished, blocks(), size)
            if self._is_local and os.path.islink(target):
                # A link to a folder would not be replaced: the file would move into that folder.
                os.unlink(target)
            self._fs.mv(unfinished, target)
            return entry

    def make_own(self) -> None:
        """Create the folder if it is on a disk; whoever creates it first could replace what is written to it.

        Raises:
            SubmitError: if another user did.
        """
        if not self._is_local:
            return
        self._fs.makedirs(self._root, exist_ok=True)
        owner = os.stat(self._root).st_uid
        if ownership.accepts_owner(owner):
            return
        # Storage may assign what this user writes to another user, such as nobody.
        with tempfile.NamedTemporaryFile(dir=self._root, prefix=".probe-") as probe:
            if os.fstat(probe.fileno()).st_uid == owner:
                return
        raise SubmitError(
            f"the folder of this run in the mirror belongs to {user_name(owner)}, who can replace the uploaded files",
            where=self.origin,
            value=self.url,
            remedy=f"choose another run.name or another mirror; if you trust this user, add {FLAG} {user_name(owner)}",
        )

    def require_trusted(self) -> None:
        """Reject a folder on a disk whose content other users could have changed: a resume runs code from it.

        Raises:
            SubmitError: with the file or folder, its owner and the remedy.
        """
        folder = Path(self._root)
        if self._is_local and (problem := ownership.folder_problem(f"the mirror of {folder.name}", folder, tree(folder))):
            raise SubmitError(problem)

    def _regular_file(self, name: str) -> str:
        """Return the path of a file to read. On a disk, it must not be a pipe or a device: reading one might never end.

        Raises:
            CheckpointError: if it is one.
        """
        path = self._path(name)
        if self._is_local and not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError("a file of the mirror is not a regular file", where=f"{self.url}/{name}")
        return path

    def _path_to_change(self, name: str, make_folder: bool = False) -> AbstractContextManager[str]:
        """Return the path of a file or folder to write or remove in a `with` block.

        On a disk, no link of another user leads to it, even if others exchange folders and links meanwhile; `make_folder`
        creates its folder there.

        Raises:
            PermissionError: with the link.
        """
        path = self._path(name)
        return entry_in_open_folder(Path(path), make_folder) if self._is_local else nullcontext(path)

    def _remove_leftovers(self, folder: str, base: str) -> None:
        """Remove temporary files that killed processes left for a file."""
        num_chars = len(_UNFINISHED) + 2 * _NUM_RANDOM_BYTES + len(f"-{base}")
        # What cannot be removed stays: no reader mistakes it for the file.
        with suppress(OSError):
            self._fs.invalidate_cache()
            for path in map(str, self._fs.ls(folder, detail=False)):
                name = path.rpartition("/")[2]
                if len(name) == num_chars and name.startswith(_UNFINISHED) and name.endswith(f"-{base}"):
                    self._retry(functools.partial(self._fs.rm_file, path))

    def _write_blocks(self, path: str, blocks: Iterable[bytes], size: int) -> FileEntry:
        digest, sent = xxhash.xxh3_128(), 0
        # If other users may write to the folder, do not follow their links.
        mode = "xb" if self._is_local else "wb"
        file = self._fs.open(path, mode, block_size=max(_BLOCK_BYTES, -(-size // _MAX_BLOCKS)))
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
            _abandon(file, self._is_object_store)
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
        raise unreachable_error(remote.url, remote.origin, operation, error) from error


def _blocks(file: io.RawIOBase, size: int) -> Iterator[bytes]:
    left = size
    while left and (block := file.read(min(_BLOCK_BYTES, left))):
        left -= len(block)
        yield block


def _abandon(file: Any, is_object_store: bool) -> None:
    """Abort a write so that no object appears: closing a file of an object store, even by garbage collection, completes it."""
    with suppress(Exception):
        if is_object_store:
            file.discard()
            file.closed = True
        else:
            file.close()
