"""The content of the launcher's cache: data caches, models, downloaded sources, scores, check results, compiled extensions.

Each entry has its size, its last use, the runs that use it, and the reason, if any, why it is kept.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import atomic_files, locks, run_store
from launcher.data.cache_dir import cache_root, shared_cache_root
from launcher.data.hub_cache import own_folder
from launcher.errors import LauncherError, Problem, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.run_damage import plan_remedy
from launcher.security.folders import is_private_folder, shared_folder_problem, usable_part
from launcher.security.library_caches import node_cache_root
from launcher.security.trust import Trust
from launcher.shell_commands import launcher_command
from launcher.tracking.metrics import format_duration

KINDS: Mapping[str, str] = {
    "data": "tokenized rows",
    "models": "converted models, and weights of other runs",
    "hub": "downloads from the Hub, kept here if others can write to its own cache",
    "sources": "downloaded data files",
    "scores": "losses of documents under weights",
    "checks": "results of checks of models and settings, and words for completion",
    "extensions": "C++ extensions of DeepSpeed that runs compile, which other programs with DeepSpeed share",
}
_CHECKS = ("isolation-checks", "weight-checks", "deepspeed-checks", "completion")
# A command that found an entry may not have started its run yet. The clock of the storage may differ by minutes.
_JUST_USED_S = 1800.0
# A build takes less time than this; anything older was left by a killed process.
_LONGEST_BUILD_S = 24 * 3600.0
# Extensions that DeepSpeed compiles for runs: collectives between CPU ranks, offloaded optimizers, NVMe. Everything else in
# torch's folder belongs to other programs.
_EXTENSIONS = ("async_io", "cpu_adam", "deepspeed_shm_comm", "pin_memory")
_LOCK_SUFFIXES = (".lock", ".lock.json")


@dataclass(frozen=True)
class CacheEntry:
    """A part of the cache that is removed as a whole. `paths[0]` is its folder.

    `lock` is the file that a process holds while it builds the entry. `runs` are the directories of the runs that use it. `kept`
    is why it is not removed, or empty. `inodes` are the device and inode of each path.
    """

    kind: str
    paths: tuple[Path, ...]
    bytes: int
    used_at: float
    lock: Path | None = None
    runs: tuple[str, ...] = ()
    kept: str = ""
    inodes: tuple[tuple[int, int] | None, ...] = ()

    @property
    def path(self) -> Path:
        return self.paths[0]

    @property
    def is_replaced(self) -> bool:
        """Whether a path leads elsewhere than when the entry was listed; a path that is gone does not count."""
        return any(now is not None and now != before for now, before in zip(map(_inode, self.paths), self.inodes, strict=True))

    def as_json(self) -> dict[str, Any]:
        values = {"kind": self.kind, "path": str(self.path), "bytes": self.bytes, "used_at": self.used_at}
        return values | {"runs": list(self.runs), "kept": self.kept or None}


@dataclass(frozen=True)
class RunUse:
    """What a run uses: `paths` in the cache. `is_unfinished`: it is live, or can be resumed without changed settings."""

    run: RunDir
    state: str
    used_at: float
    paths: tuple[str, ...]

    @property
    def is_unfinished(self) -> bool:
        return self.state != "completed"


def list_entries(roots: Iterable[Path], shared: bool = False) -> list[CacheEntry]:
    """List this user's cache entries, ordered by last use, oldest first.

    `roots` are the folders of runs that may use the cache. Data caches that a group shares are kept unless `shared`: the other
    members' runs are unknown.

    Raises:
        SubmitError: if an unfinished run's plan is unreadable, so that it is unknown what the run uses.
    """
    uses = _uses(roots)
    found = [*_data(shared), *_models(), *_hub(), *_sources(), *_scores(), *_checks(), *_extensions()]
    building = [entry for entry in found if entry.kind == "data" and entry.lock is not None and is_locked(entry.lock)]
    entries = [_judge(entry, uses, bool(building)) for entry in found if _is_own(entry.path)]
    return sorted(entries, key=lambda entry: entry.used_at)


def _uses(roots: Iterable[Path]) -> list[RunUse]:
    uses, problems, trust = [], [], Trust.from_environ(os.environ)
    for run in {run.root.resolve(): run for root in roots for run in run_store.list_runs(root)}.values():
        # Other users' runs use their own caches, or a group's, which are kept.
        if not _accepts(trust, run):
            continue
        state, used_at = _state(run)
        plans = (run.plan, *run_store.changed_plan_paths(run))
        paths: set[str] = set()
        unreadable: list[Path] = []
        for path in plans:
            try:
                paths |= set(_paths_of(run_store.read_plan_values(path)))
            except LauncherError:
                unreadable.append(path)
        if unreadable and state != "completed":
            message = "the plan of a run cannot be read, so what it uses is unknown"
            remedy = f"{plan_remedy(unreadable[0])}, or remove the run: {launcher_command('rm', run.root)}"
            problems.append(Problem(message, str(unreadable[0]), remedy=remedy))
        uses.append(RunUse(run, state, used_at, tuple(paths)))
    if problems:
        raise SubmitError(problems)
    return uses


def _accepts(trust: Trust, run: RunDir) -> bool:
    # It may have been removed after it was listed.
    with suppress(OSError):
        return trust.anyone or trust.accepts_owner(run.root.stat().st_uid)
    return False


def _state(run: RunDir) -> tuple[str, float]:
    try:
        status = run_store.read_status(run)
        return status.state, status.updated_at
    except LauncherError:
        return "unknown", time.time()


def _paths_of(part: Any) -> Iterator[str]:
    """Yield all absolute paths in a plan: data caches of all splits, model, tokenizer, and whatever plans add."""
    if isinstance(part, dict):
        for value in part.values():
            yield from _paths_of(value)
    elif isinstance(part, list):
        for value in part:
            yield from _paths_of(value)
    elif isinstance(part, str) and part.startswith("/"):
        yield os.path.realpath(part)


def _judge(entry: CacheEntry, uses: Sequence[RunUse], is_building: bool) -> CacheEntry:
    """Add to an entry the runs that use it, and why it is kept."""
    folder = os.path.realpath(entry.path)
    users = [use for use in uses if any(path == folder or path.startswith(f"{folder}{os.sep}") for path in use.paths)]
    entry = replace(
        entry,
        runs=tuple(str(use.run.root) for use in users),
        used_at=max((entry.used_at, *(use.used_at for use in users))),
    )
    return replace(entry, kept=_reason(entry, users, uses, is_building))


def _reason(entry: CacheEntry, users: Sequence[RunUse], uses: Sequence[RunUse], is_building: bool) -> str:
    if entry.lock is not None and is_locked(entry.lock):
        holder = locks.read_holder(entry.lock)
        return f"being built by process {holder.pid} on {holder.host}" if holder is not None else "being built"
    if unfinished := [f"{use.run.root.name} ({use.state})" for use in users if use.is_unfinished]:
        return f"used by {', '.join(unfinished)}"
    running = [use.run.root.name for use in uses if use.state in ("pending", "running", "saving")]
    if entry.kind == "extensions" and running:
        return f"may be used by {', '.join(running)}"
    if entry.kind == "sources" and is_building:
        return "data is being built"
    used_s = time.time() - entry.used_at
    just_used = f"used {format_duration(max(0.0, used_s))} ago" if used_s < _JUST_USED_S else ""
    return entry.kept or just_used


def is_locked(lock: Path) -> bool:
    """Return whether a process holds a lock file; does not change the file."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _entry(kind: str, *paths: Path, lock: Path | None = None, kept: str = "") -> CacheEntry:
    num_bytes, used_at = 0, 0.0
    inodes = tuple(map(_inode, paths))
    for path in paths:
        path_bytes, path_used_at = _measure(path)
        num_bytes, used_at = num_bytes + path_bytes, max(used_at, path_used_at)
    return CacheEntry(kind, paths, num_bytes, used_at, lock, kept=kept, inodes=inodes)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _measure(path: Path) -> tuple[int, float]:
    """Return the size of a file or folder in bytes, and when any of its files was last read or written.

    Storage without access times (noatime) shows the time of the last write.
    """
    num_bytes, used_at = 0, 0.0
    with suppress(OSError):
        used_at = path.lstat().st_mtime
    inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    for file in inside if path.is_dir() and not path.is_symlink() else [path]:
        with suppress(OSError):
            status = file.lstat()
            num_bytes += status.st_size
            used_at = max(used_at, status.st_atime, status.st_mtime)
    return num_bytes, used_at


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_own(path: Path) -> bool:
    with suppress(OSError):
        return path.lstat().st_uid == os.geteuid()
    return False


def _data(shared: bool) -> Iterator[CacheEntry]:
    shared_root = shared_cache_root() or cache_root()
    of_groups = (folder for folder in sorted(shared_root.glob("data-?*")) if shared_folder_problem(folder) is None)
    for root in (*_part("data"), *of_groups):
        children = _children(root)
        names = {path.name for path in children}
        for path in children:
            key = path.name.removesuffix(".partial").removesuffix(".texts.json")
            group = root.name.removeprefix("data").removeprefix("-")
            owner = f"-{os.geteuid()}" if group else ""
            kept = f"shared with the group {group}" if group and not shared else ""
            if path.name == key and path.is_dir() and not _is_temporary(path):
                texts = path.with_name(f"{key}.texts.json")
                extra = [texts] if texts.name in names else []
                yield _entry("data", path, *extra, lock=path.with_name(f"{key}{owner}.lock"), kept=kept)
            elif path.name.endswith(".partial"):
                # Its builder was killed, unless it holds the lock.
                yield _entry("data", path, lock=path.with_name(f"{key}.lock"))
            elif path.name.endswith(".texts.json") and key not in names:
                yield _entry("data", path)
            elif _is_temporary(path):
                yield _entry("data", path, kept=_recent_build(path))


def _models() -> Iterator[CacheEntry]:
    for path in (path for folder in _part("models") for path in _children(folder)):
        if _is_temporary(path):
            yield _entry("models", path, kept=_recent_build(path))
        elif path.is_dir():
            yield _entry("models", path, lock=path.with_name(f".{path.name}.lock"))


def _hub() -> Iterator[CacheEntry]:
    for path in (path for folder in _part(own_folder().name) for path in _children(folder)):
        if path.is_dir() and not path.name.startswith("."):
            yield _entry("hub", path)


def _sources() -> Iterator[CacheEntry]:
    for path in (path for folder in _part("sources") for path in _children(folder)):
        if path.is_dir():
            yield _entry("sources", path, lock=path / ".lock")


def _scores() -> Iterator[CacheEntry]:
    for path in (path for folder in _part("scores") for path in _children(folder)):
        if path.is_dir():
            yield _entry("scores", path, kept=_recent_build(path) if _is_temporary(path) else "")


def _checks() -> Iterator[CacheEntry]:
    for name in _CHECKS:
        yield from (_entry("checks", folder) for folder in _part(name))


def _part(name: str) -> Iterator[Path]:
    """Yield a cache folder, unless it is a link or other users could have replaced it: it could lead anywhere."""
    if (folder := usable_part(cache_root() / name)) is not None:
        yield folder


def _extensions() -> Iterator[CacheEntry]:
    """Yield the runs' extensions in torch's folder, and in the one on a node whose home directory is not writable."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    roots = [usable_part(Path(own).expanduser().absolute() if own else cache / "torch_extensions")]
    if is_private_folder(node := node_cache_root()):
        roots.append(usable_part(node / "torch_extensions_dir"))
    for root in filter(None, roots):
        # The default folder has an extra level, one folder for each version of Python and CUDA.
        folders = (folder for folder in (root, *_children(root)) if folder.is_dir() and not folder.is_symlink())
        for path in (folder / name for folder in folders for name in _EXTENSIONS):
            if not path.is_symlink() and (path / "build.ninja").is_file():
                yield _entry("extensions", path, lock=path / "lock")


def _is_temporary(path: Path) -> bool:
    """Return whether a folder has the temporary name under which a process fills or removes it."""
    return path.is_dir() and path.name.startswith(".") and not path.name.endswith(_LOCK_SUFFIXES)


def _recent_build(path: Path) -> str:
    if path.name.startswith(atomic_files.REMOVING_PREFIX):
        return ""
    return "another process may be building it" if time.time() - _measure(path)[1] < _LONGEST_BUILD_S else ""
