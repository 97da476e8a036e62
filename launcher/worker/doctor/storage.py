"""The folders that a run writes to: run storage, shared memory, and caches. Every file is removed again."""

from __future__ import annotations

import fcntl
import os
import pwd
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.clusters.check_results import SHARED_FILE_VARIABLE, WARNING, CheckResult, failure, from_problem, ok, warning
from launcher.clusters.storage import existing_folder, filesystem_type
from launcher.config.schema import RunConfig
from launcher.data.cache_dir import cache_root
from launcher.data.hub_cache import own_folder
from launcher.hardware import may_use_gpus
from launcher.plan.quantities import format_size
from launcher.security.library_caches import cache_folders, foreign_caches, is_writable
from launcher.worker.checks import node_check
from launcher.worker.doctor.torch_build import read_torch_build

_CHUNK_BYTES, _NUM_CHUNKS = 4 << 20, 32
# A checkpoint of 100 GiB takes a quarter of an hour at this speed.
_SLOW_BYTES_PER_S = 100e6
_LITTLE_BYTES, _TOO_LITTLE_BYTES = 20 << 30, 1 << 30
_LITTLE_CACHE_BYTES = 10 << 30
# A run writes a few hundred files, plus more for each checkpoint.
_FEW_INODES = 10_000
_SHARED_REMEDY = "set run.root to a folder on storage that all nodes share"


def check_run_storage(config: RunConfig) -> Iterator[CheckResult]:
    """Write, sync, read, rename and lock a file beside the runs, and check the free space there."""
    root = Path(config.run.root).expanduser().absolute()
    shared, _, content = os.environ.get(SHARED_FILE_VARIABLE, "").rpartition("=")
    if shared:
        try:
            is_shared = Path(shared).read_text() == content
        except OSError:
            is_shared = False
        if not is_shared:
            yield failure(
                f"{root} is not the folder that the submitting machine sees: a file written there is not here", _SHARED_REMEDY
            )
            return
    folder = Path(shared).parent if shared else existing_folder(root)
    if not is_writable(folder):
        yield failure(f"{folder} cannot be written", "check its owner and permissions, or set run.root to another folder")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".launcher-doctor-", dir=folder) as scratch:
            yield from _exercise(Path(scratch), root)
    except OSError as error:
        yield failure(
            f"{folder}: {error.strerror or error}", "check its permissions, its quota and that it is mounted for writing"
        )
        return
    yield from _check_room(folder)


def _exercise(folder: Path, root: Path) -> Iterator[CheckResult]:
    """Perform the file operations of a checkpoint."""
    file, chunk = folder / "shard", os.urandom(_CHUNK_BYTES)
    started = time.perf_counter()
    with open(file, "xb", buffering=0) as opened:
        for _ in range(_NUM_CHUNKS):
            opened.write(chunk)
        os.fsync(opened.fileno())
        write_s = time.perf_counter() - started
        # Otherwise the read would be served from memory.
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    renamed, started = folder / "committed", time.perf_counter()
    os.replace(file, renamed)
    with open(renamed, "rb", buffering=0) as opened:
        is_intact = all(opened.read(_CHUNK_BYTES) == chunk for _ in range(_NUM_CHUNKS))
    read_s = time.perf_counter() - started
    if not is_intact:
        yield failure(f"{root} returned different content from what was written", "ask the administrators to check the storage")
        return
    num_bytes = _CHUNK_BYTES * _NUM_CHUNKS
    kind = filesystem_type(folder, Path("/proc/self/mountinfo").read_text()) or "unknown"
    seen = f"{root} on {kind}: writes {num_bytes / write_s / 1e6:,.0f} MB/s, reads {num_bytes / read_s / 1e6:,.0f} MB/s"
    if num_bytes / write_s < _SLOW_BYTES_PER_S:
        minutes = 100 * 2**30 / (num_bytes / write_s) / 60
        yield warning(
            f"{seen}; a checkpoint of 100 GiB takes {minutes:,.0f} minutes", "set run.root to a folder on faster storage"
        )
    else:
        yield ok(seen)
    yield from _check_locks(renamed)


def _check_locks(file: Path) -> Iterator[CheckResult]:
    """Check that a locked file cannot be locked again."""
    remedy = "mount the storage with file locks (NFS: without nolock; Lustre: with flock), or set run.root to another folder"
    with open(file, "r+b") as first, open(file, "r+b") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield failure(f"files cannot be locked: {error.strerror}", remedy)
            return
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    yield failure("file locks have no effect: a locked file could be locked again", remedy)


def _check_room(folder: Path) -> Iterator[CheckResult]:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    # Some file systems do not count inodes and report 0.
    inodes = f", {status.f_favail:,} inodes" if status.f_files else ""
    seen, remedy = f"{format_size(free)}{inodes} free beside the runs", "free space there, or set run.root to another disk"
    if free < _TOO_LITTLE_BYTES:
        yield failure(seen, remedy)
    elif free < _LITTLE_BYTES or (status.f_files and status.f_favail < _FEW_INODES):
        yield warning(f"{seen}, which is little; `plan` shows what a checkpoint takes", remedy)
    else:
        yield ok(seen)


def check_shared_memory(config: RunConfig) -> Iterator[CheckResult]:
    """Check /dev/shm, through which the ranks of a node communicate."""
    build = read_torch_build() if may_use_gpus() else ""
    num_gpus = 0 if isinstance(build, str) else build.num_gpus
    device = "cuda" if num_gpus else "cpu"
    problems = node_check.shared_memory_problems(device, config.cluster.ranks_per_node or num_gpus or 1)
    yield from map(from_problem, problems)
    if not problems:
        status = os.statvfs(node_check.SHARED_MEMORY)
        size, free = (format_size(blocks * status.f_frsize) for blocks in (status.f_blocks, status.f_bavail))
        yield ok(f"{free} of {size} free")


def check_caches(config: RunConfig) -> Iterator[CheckResult]:
    """Check that the caches are writable, belong to this user, and have free space."""
    home = Path(os.environ.get("HOME") or "/")
    hub = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
    for name, folder, variable in (("the launcher's cache", cache_root(), "LAUNCHER_CACHE"), ("the Hub's cache", hub, "HF_HOME")):
        yield from _check_cache(name, folder.expanduser().absolute(), variable)
    for problem in foreign_caches(os.environ).values():
        yield from_problem(problem, WARNING)
    closed = [f"{variable} ({folder})" for variable, folder in cache_folders(os.environ).items() if not is_writable(folder)]
    if closed:
        seen = (
            f"folders for compiled code cannot be written: {', '.join(closed)}; runs use a folder under {tempfile.gettempdir()}"
        )
        yield warning(seen, "set these variables to folders that you can write to; compiled code is then kept between runs")


def _check_cache(name: str, folder: Path, variable: str) -> Iterator[CheckResult]:
    existing = existing_folder(folder)
    elsewhere = f"set {variable} to a folder on another disk"
    if not is_writable(folder) and variable == "HF_HOME":
        yield ok(f"{name} cannot be written: {folder}; models are downloaded to {own_folder()}")
        return
    if not is_writable(folder):
        yield failure(f"{name} cannot be written: {folder}", f"check the owner and the permissions of {existing}, or {elsewhere}")
        return
    status, free = existing.stat(), os.statvfs(existing)
    num_free = free.f_bavail * free.f_frsize
    if folder == existing and status.st_uid not in (os.geteuid(), 0):
        seen = f"{name} belongs to {_user(status.st_uid)}, who can replace what a run reads: {folder}"
        yield warning(seen, f"use a cache of your own: {elsewhere}; docs/security.md shows how a group shares one")
    elif num_free < _LITTLE_CACHE_BYTES:
        yield warning(f"{name} has {format_size(num_free)} free: {folder}", f"free space there, or {elsewhere}")
    else:
        yield ok(f"{name}: {folder}, {format_size(num_free)} free")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
