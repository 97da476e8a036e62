"""Atomic files and directories: after a crash each one is complete or absent, never partial.

Content is written under a temporary name in the same directory, fsynced, and renamed; the directory is fsynced after the rename.
"""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

_READ_BYTES = 8 * 2**20
_FLUSH_BYTES = 32 * 2**20
_NUM_FSYNC_THREADS = 16
# A directory that is being replaced keeps its content under this prefix until its successor is in place.
REPLACED_PREFIX = ".replaced-"
REMOVING_PREFIX = ".removing-"


def fault_point(point: str) -> None:
    """Mark a point in a save (begun, copied, half-written, noted, gathered, manifest, committed); tests put a fault there."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hex XXH3-128 digest of one file."""

    size: int
    xxh3_128: str


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with a value as indented JSON; see `write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` with a text in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace `path` atomically: readers see the previous content or `content`, never a part of it.

    `mode` holds the permissions before the umask. A file that cannot be written leaves the previous content in place.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not name its file
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def append_lines(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Append lines with a single write, so that lines of several writers never mix, and make them durable.

    Raises:
        OSError: if that fails; a torn line may be left, which readers skip.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, mode)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            # Whatever follows a torn line would be lost with it.
            content = b"\n" + content
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not size:
        fsync_path(path.parent)


def read_short_text(path: Path, max_bytes: int) -> str:
    """Return the beginning of a small file that other users may have put there; reading a pipe or a device might never end."""
    with io.BufferedReader(open_regular(path)) as file:
        return file.read(max_bytes).decode()


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for unbuffered reading; opening a pipe would wait for a writer, which may never come."""
    file = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return file


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write and fsync a file that does not exist yet; return its size and digest, computed on the way.

    Raises:
        FileExistsError: if the file exists.
        OSError: if the file cannot be written; names the file.
    """
    digest, size = xxhash.xxh3_128(), 0
    try:
        with open(path, "xb") as file:
            num_flushed = 0
            for chunk in chunks:
                digest.update(chunk)
                size += file.write(chunk)
                if size - num_flushed > _FLUSH_BYTES:
                    # Start writing to disk now, instead of writing everything at the end.
                    file.flush()
                    os.posix_fadvise(file.fileno(), num_flushed, size - num_flushed, os.POSIX_FADV_DONTNEED)
                    num_flushed = size
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # a failed write does not name its file
        raise
    return FileEntry(size=size, xxh3_128=digest.hexdigest())


def digest_file(path: Path, on_read: Callable[[int], None] | None = None) -> FileEntry:
    """Return size and digest of a file on disk; `on_read` is called with the number of bytes of each block."""
    digest, size = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(_READ_BYTES))
    with open_regular(path) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
            if on_read is not None:
                on_read(count)
    return FileEntry(size=size, xxh3_128=digest.hexdigest())


def refresh_directory(folder: Path) -> float:
    """Make a network file system's client drop its cached view of a directory, by creating a file in it.

    Returns the file system's own time in seconds since the epoch, comparable with the times of its files.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".look-") as file:
        return os.fstat(file.fileno()).st_mtime


def fsync_path(path: Path) -> None:
    """Make the content of a file durable, or creations, renames and removals in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make all files and directories in a folder durable. Uses threads, because a file system batches journal commits."""
    paths = [folder, *folder.rglob("*")]
    with ThreadPoolExecutor(_NUM_FSYNC_THREADS) as pool:
        for is_kind in (Path.is_file, Path.is_dir):
            deque(pool.map(fsync_path, filter(is_kind, paths)), maxlen=0)


def rename(source: Path, target: Path) -> None:
    """Rename a file or a complete directory within one directory, durably.

    Raises:
        OSError: if `target` is a directory that is not empty, or the rename fails.
    """
    os.rename(source, target)
    fsync_path(target.parent)


def replace_directory(source: Path, target: Path) -> None:
    """Rename a complete directory to `target`, then remove the previous `target`. Both must be in the same directory."""
    aside = replaced_path(target)
    if target.exists():
        if aside.exists():
            remove_directory(aside)
        os.rename(target, aside)
    rename(source, target)
    if aside.exists():
        # The next sweep removes what cannot be removed now.
        with suppress(OSError):
            remove_directory(aside)


def remove_directory(path: Path) -> None:
    """Remove a directory; its name disappears by one rename.

    Files that a reader holds open on a network file system cannot be removed; the next sweep removes them.
    """
    removing = path.with_name(f"{REMOVING_PREFIX}{secrets.token_hex(8)}")
    os.rename(path, removing)
    shutil.rmtree(removing, ignore_errors=True)


def replaced_path(target: Path) -> Path:
    """Return where `replace_directory` keeps the previous directory until its successor is in place."""
    return target.with_name(REPLACED_PREFIX + target.name)
