"""Directories beside a run's checkpoints: unfinished saves and removals, and checkpoints that were set aside."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import atomic_files
from launcher.checkpoint import store
from launcher.errors import CheckpointError, DamagedCheckpoint

# Shown for the directory of a save in progress.
BEING_WRITTEN = "being written"
_DESCRIPTIONS = {
    ".saving-step-": "unfinished save",
    f"{atomic_files.REPLACED_PREFIX}step-": "replaced checkpoint",
    atomic_files.REMOVING_PREFIX: "unfinished removal",
    f"{store.SET_ASIDE_PREFIX}step-": "set aside when the run went back to an earlier step",
    f"{store.DAMAGED_PREFIX}step-": "set aside as damaged",
}


@dataclass(frozen=True)
class Leftover:
    """A directory beside the checkpoints: its path, a description for the user, and the bytes of its files."""

    path: Path
    what: str
    bytes: int

    def as_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "what": self.what, "bytes": self.bytes}


def find_leftovers(root: Path, writing: int | None = None) -> list[Leftover]:
    """List the launcher's directories under `root` that are not checkpoints; directories with other names are ignored.

    `writing` is the number of the running attempt, None if no attempt runs: its save in progress is BEING_WRITTEN.
    """
    in_progress = set() if writing is None else set(root.glob(f".saving-step-*-{writing:03d}"))
    return [
        Leftover(path, BEING_WRITTEN if path in in_progress else what, disk_bytes(path))
        for path in (sorted(root.iterdir()) if root.is_dir() else ())
        for prefix, what in _DESCRIPTIONS.items()
        if path.name.startswith(prefix) and not _is_in_use(path) and path.is_dir()
    ]


def has_unfinished_saves(root: Path) -> bool:
    """Return whether a save is in progress or was interrupted."""
    return any(root.glob(".saving-step-*"))


def _is_in_use(path: Path) -> bool:
    """Return whether a replaced checkpoint still counts as committed, because its successor is not in place."""
    if not path.name.startswith(atomic_files.REPLACED_PREFIX):
        return False
    try:
        store.open_checkpoint(path.with_name(path.name.removeprefix(atomic_files.REPLACED_PREFIX)))
        return False
    except CheckpointError:
        pass
    try:
        store.open_checkpoint(path)
    except CheckpointError as error:
        # A checkpoint that is unreadable right now may be intact.
        return not isinstance(error, DamagedCheckpoint)
    return True


def remove(path: Path) -> None:
    """Remove a checkpoint or a leftover of a run that no process writes to."""
    if path.name.startswith(atomic_files.REMOVING_PREFIX):
        shutil.rmtree(path, ignore_errors=True)
    else:
        atomic_files.remove_directory(path)


def disk_bytes(path: Path) -> int:
    """Return the bytes of all files under `path`, ignoring files that disappear meanwhile: a run may be writing there.

    Raises:
        OSError: if storage fails in another way.
    """

    def ignore_missing(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    num_bytes = 0
    for folder, _, names in os.walk(path, onerror=ignore_missing):
        for name in names:
            try:
                num_bytes += Path(folder, name).lstat().st_size
            except OSError as error:
                ignore_missing(error)
    return num_bytes
