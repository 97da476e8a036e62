"""Checks of the folders that a run reads and writes. Every file that they write is removed again."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from launcher.clusters.check_results import SHARED_FILE_VARIABLE, CheckResult, failure, ok, warning
from launcher.clusters.storage import existing_folder
from launcher.data.cache_dir import cache_path
from launcher.plan.quantities import format_size
from launcher.worker.checks.checked_node import CheckedNode

# Failures with this beginning concern the disk that all nodes share, whichever node reports them.
NO_ROOM = "the disk of the run directory has no room"
_CHUNK_BYTES = 4 << 20
# Enough to measure a speed; the check before a start writes one.
_NUM_CHUNKS = 32
# A checkpoint of 100 GiB takes a quarter of an hour at this speed.
_SLOW_BYTES_PER_S = 100e6
_CHECKPOINT_MARGIN = 1.2
_LITTLE_BYTES, _TOO_LITTLE_BYTES = 20 << 30, 1 << 30
_SHARED_REMEDY = "set run.root to a folder on storage that all nodes share"


def check_run_storage(node: CheckedNode) -> Iterator[CheckResult]:
    """Check that this node sees the same folder as the others, and write, sync, read, rename and lock a file there."""
    if node.plan is not None:
        root, folder = node.run.root, node.run.attempt(node.attempt)
        if not os.access(root, os.R_OK | os.X_OK):
            yield failure(f"the run directory is not visible: {root}", _SHARED_REMEDY)
            return
        if not (folder / "attempt.json").is_file():
            seen = f"the run directory differs from that of the other nodes: it lacks the attempt: {folder}"
            yield failure(seen, _SHARED_REMEDY)
            return
    else:
        root = Path(node.config.run.root).expanduser().absolute()
        shared, _, content = os.environ.get(SHARED_FILE_VARIABLE, "").rpartition("=")
        folder = Path(shared).parent if shared else existing_folder(root)
        if shared and (not os.access(shared, os.R_OK) or Path(shared).read_text() != content):
            seen = f"{root} is not the folder that the submitting machine sees: a file written there is not here"
            yield failure(seen, _SHARED_REMEDY)
            return
    try:
        with tempfile.TemporaryDirectory(prefix=".launcher-check-", dir=folder) as scratch:
            yield from _exercise(Path(scratch), root, 1 if node.plan is not None else _NUM_CHUNKS)
    except OSError as error:
        no_room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        seen = f"{NO_ROOM if no_room else 'the run directory cannot be written'}: {error.strerror}: {folder}"
        yield failure(seen, "check its permissions, its quota and that it is mounted for writing; or set run.root")
        return
    free = shutil.disk_usage(folder).free
    needed = int(_CHECKPOINT_MARGIN * node.plan.checkpoint_bytes) if node.plan is not None else _TOO_LITTLE_BYTES
    remedy = "free space on it, or set run.root to another disk"
    if free < needed:
        yield failure(f"{NO_ROOM} for a checkpoint: {root}: {format_size(free)} free, {format_size(needed)} needed", remedy)
    elif node.plan is None and free < _LITTLE_BYTES:
        yield warning(f"{format_size(free)} free beside the runs, which is little", remedy)
    else:
        yield ok(f"{format_size(free)} free beside the runs")


def _exercise(folder: Path, root: Path, num_chunks: int) -> Iterator[CheckResult]:
    """Perform the file operations of a checkpoint."""
    file, chunk = folder / "shard", os.urandom(_CHUNK_BYTES)
    started = time.perf_counter()
    with open(file, "xb", buffering=0) as opened:
        for _ in range(num_chunks):
            opened.write(chunk)
        os.fsync(opened.fileno())
        write_s = time.perf_counter() - started
        # Otherwise the read would be served from memory.
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    renamed, started = folder / "committed", time.perf_counter()
    os.replace(file, renamed)
    with open(renamed, "rb", buffering=0) as opened:
        while opened.read(_CHUNK_BYTES):
            pass
    read_s = time.perf_counter() - started
    num_bytes = _CHUNK_BYTES * num_chunks
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(mount.mountpoint)]
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"
    seen = f"{root} on {kind}: writes {num_bytes / write_s / 1e6:,.0f} MB/s, reads {num_bytes / read_s / 1e6:,.0f} MB/s"
    if num_chunks == _NUM_CHUNKS and num_bytes / write_s < _SLOW_BYTES_PER_S:
        yield warning(
            f"{seen}; a checkpoint of 100 GiB takes {100 * 2**30 * write_s / num_bytes / 60:,.0f} minutes",
            "set run.root to a folder on faster storage",
        )
    else:
        yield ok(seen)
    remedy = "mount the storage with file locks (NFS: without nolock; Lustre: with flock), or set run.root to another folder"
    with open(renamed, "r+b") as first, open(renamed, "r+b") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError as error:
            yield failure(f"files cannot be locked: {error.strerror}", remedy)
            return
    yield failure("file locks have no effect: a locked file could be locked again", remedy)


def check_inputs(node: CheckedNode) -> Iterator[CheckResult]:
    """Check that this node sees the data cache, the model and the tokenizer of the run."""
    plan = node.plan
    if plan is None:
        return
    inputs = (
        *(("a data cache", folder, "meta.json") for folder in plan.cache_dirs),
        ("the model", plan.model.path, "config.json"),
        ("the tokenizer", plan.model.tokenizer_path, "."),
    )
    for subject, folder, file in inputs:
        if folder and not os.access(Path(folder, file), os.R_OK):
            remedy = "put it on storage that all nodes share: LAUNCHER_CACHE, or HF_HOME for a model of the Hub, on every node"
            yield failure(f"{subject} is not visible: {folder}", remedy)


def check_caches(node: CheckedNode) -> Iterator[CheckResult]:
    """Check that the caches can be written and have room."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(os.environ.get("HF_HOME") or home / "huggingface")
    for variable, cache in (("LAUNCHER_CACHE", cache_path()), ("HF_HOME", hub)):
        folder = existing_folder(cache.expanduser().absolute())
        free, remedy = shutil.disk_usage(folder).free, f"set {variable} to a folder on another disk"
        if not os.access(folder, os.W_OK | os.X_OK):
            yield (failure if variable == "LAUNCHER_CACHE" else warning)(f"{cache} cannot be written", remedy)
        elif free < _LITTLE_BYTES:
            yield warning(f"{cache}: {format_size(free)} free, which is little", remedy)
        else:
            yield ok(f"{cache}: {format_size(free)} free")
