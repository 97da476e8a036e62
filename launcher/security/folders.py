"""Folders that a run creates for its user only, or for the members of a group."""

from __future__ import annotations

import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.errors import ConfigError, DataError, Problem
from launcher.security.owners import Trust, describe_permissions, folder_problem, group_id

# Caches that libraries keep in the home directory, and fail without: in many containers it is read-only, or missing.
_HOME_CACHES = (
    *("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HF_MODULES_CACHE", "HF_XET_CACHE"),
    *("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"),
)

_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def private_files() -> Iterator[None]:
    """Make everything that this process writes readable only by its user, as in a run; use it if only one thread writes."""
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def make_own_folder(folder: Path) -> None:
    """Create a folder and its missing parents; only this user, and a trusted group, can write to them.

    Raises:
        OSError: if one cannot be created.
    """
    mode = 0o775 if Trust.from_environ(os.environ).gids else 0o755
    for one in (*reversed(folder.parents), folder):
        if not one.is_dir():
            one.mkdir(mode=mode, exist_ok=True)


def make_shared_folder(folder: Path, group: str) -> None:
    """Create a folder in which each member of a group can create files and change only their own.

    Raises:
        DataError: if the group does not exist, this user is not a member, or others than members could replace the folder.
        OSError: if it cannot be created.
    """
    gid = shared_group(group)
    if gid not in (*os.getgroups(), os.getegid()) and os.geteuid() != 0:
        remedy = "name a group that you belong to; `id` lists them"
        raise DataError(Problem("this user does not belong to the group", "data.cache_group", group, remedy))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        os.chown(folder, -1, gid)
        folder.chmod(0o3770)
    require_cache(folder, group)


def share(folder: Path, group: str) -> None:
    """Let a group's members read a folder and its content."""
    gid = shared_group(group)
    for parent, _, names in os.walk(folder):
        os.chown(parent, -1, gid)
        os.chmod(parent, 0o750)  # noqa: S103
        for name in names:
            os.chown(os.path.join(parent, name), -1, gid)
            os.chmod(os.path.join(parent, name), 0o640)


def shared_group(group: str) -> int:
    """Return the gid of the group in data.cache_group.

    Raises:
        DataError: if this machine does not have it.
    """
    try:
        return group_id(group)
    except KeyError:
        remedy = "name a group of this machine that you belong to; `id` lists them"
        raise DataError(Problem("there is no such group", "data.cache_group", group, remedy)) from None


def require_cache(folder: Path, group: str | None = None) -> None:
    """Reject a folder of the launcher's cache that other users could change; `group` is one that intentionally shares it.

    Raises:
        DataError: with the folder, its owner and the remedy.
    """
    trust = Trust.from_environ(os.environ)
    trust = trust if group is None else trust.with_group(shared_group(group))
    # The folder is checked again once it exists.
    if problem := _cache_problem(folder, folder.exists(), trust):
        raise DataError(problem)


@functools.cache
def _cache_problem(folder: Path, exists: bool, trust: Trust) -> Problem | None:
    problem = folder_problem("this cache", folder, trust)
    if problem is None:
        return None
    elsewhere = "set LAUNCHER_CACHE to a folder of your own, or share one in a group with data.cache_group"
    return Problem(problem.message, problem.where, problem.value, f"{elsewhere}; {problem.remedy}")


def make_private_folder(folder: Path, where: str) -> None:
    """Create an empty folder that only this user can enter, replacing their earlier one; `where` names its setting.

    Several processes of this user, such as those on nodes that share the folder, may call this at the same time, before any of
    them writes to it.

    Raises:
        ConfigError: if another user created it.
        OSError: if it cannot be created.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private_folder(folder):
        remedy = "remove it, or set another folder; a sticky folder above it (chmod +t) keeps others from replacing yours"
        message = "the folder exists already, and this user cannot empty it: another user may have created it"
        raise ConfigError(message, where=where, value=f"{folder}: {describe_permissions(folder)}", remedy=remedy)


def is_private_folder(folder: Path) -> bool:
    """Return whether this is a folder (not a link) that belongs to this user and that no other user can enter."""
    with suppress(OSError):
        status = folder.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return False


def is_writable(folder: Path) -> bool:
    """Return whether the folder, or its closest existing parent, is writable."""
    existing = next((path for path in (folder, *folder.parents) if os.path.exists(path)), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


@functools.cache
def temporary_folder(parent: str | None = None) -> Path:
    """Return a folder in `parent`, by default TMPDIR, for temporary files and compiled kernels of this user only.

    Libraries load code from folders of known names in TMPDIR. Later processes find the folder again, unless another user took it.
    """
    folder = Path(parent or tempfile.gettempdir())
    if folder.name != (name := f"launcher-{os.geteuid()}"):
        folder /= name
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder if is_private_folder(folder) else Path(tempfile.mkdtemp(prefix="launcher-"))


def private_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a process of a run: TMPDIR, and folders in it for libraries if the home directory is read-only."""
    folder = temporary_folder(environ.get("TMPDIR"))
    variables = {"TMPDIR": str(folder)}
    caches = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "/") / ".cache")
    if not is_writable(caches):
        variables |= {name: str(folder / name.lower()) for name in _HOME_CACHES if not environ.get(name)}
        caches = folder
    # torch itself sets it to a folder in the temporary one, which later jobs may not find again.
    if Path(environ.get(_INDUCTOR, "torchinductor_")).name.startswith("torchinductor_"):
        variables[_INDUCTOR] = str(caches / "torchinductor")
    return variables
