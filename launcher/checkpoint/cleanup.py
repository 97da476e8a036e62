"""What lies beside the checkpoints of a run and is none: saves that did not end, and what was set aside."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import atomic_files
from launcher.checkpoint import store
from launcher.errors import CheckpointError, DamagedCheckpoint

# What a save in progress fills is none yet.
BEING_WRITTEN = "being written"
_WHAT = {
    ".saving-step-": "a save that did not end",
    f"{atomic_files.REPLACED_PREFIX}step-": "a checkpoint that another has replaced",
    atomic_files.REMOVING_PREFIX: "a removal that did not end",
    f"{store.SET_ASIDE_PREFIX}step-": "set aside when the run went back to an earlier step",
    f"{store.DAMAGED_PREFIX}step-": "set aside as damaged",
}


@dataclass(frozen=True)
class Leftover:
    """A directory beside the checkpoints, in words, and the bytes of its files."""

    path: Path
    what: str
    bytes: int

    def as_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "what": self.what, "bytes": self.bytes}


def find_leftovers(root: Path, writing: int | None = None) -> list[Leftover]:
    """What is left under `root` besides checkpoints; directories of other names are not this launcher's.

    `writing` is the attempt that runs, where one does: what that is just saving is BEING_WRITTEN.
    """
    found = sorted(root.iterdir()) if root.is_dir() else []
    return [
        Leftover(path, BEING_WRITTEN if _is_save_of(path, writing) else what, disk_bytes(path))
        for path in found
        for prefix, what in _WHAT.items()
        if path.name.startswith(prefix) and not _is_in_use(path) and path.is_dir()
    ]


def has_unfinished_saves(root: Path) -> bool:
    """True where a save has not ended, or not yet."""
    return any(root.glob(".saving-step-*"))


def _is_save_of(path: Path, attempt: int | None) -> bool:
    return attempt is not None and path.name.startswith(".saving-step-") and path.name.endswith(f"-{attempt:03d}")


def _is_in_use(path: Path) -> bool:
    """True of a replaced checkpoint while the one that takes its place is not there: it counts as committed until then."""
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
        # What cannot be read now may be whole.
        return not isinstance(error, DamagedCheckpoint)
    return True


def remove(path: Path) -> None:
    """Remove a checkpoint or a leftover, in a run that nobody writes to."""
    if path.name.startswith(atomic_files.REMOVING_PREFIX):
        shutil.rmtree(path, ignore_errors=True)
    else:
        atomic_files.remove_directory(path)


def disk_bytes(path: Path) -> int:
    """Bytes of all files under `path`, without those that vanish while they are counted: a run may be at work there.

    Raises:
        OSError: where storage gives another answer.
    """

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    num_bytes = 0
    for folder, _, names in os.walk(path, onerror=unless_gone):
        for name in names:
            try:
                num_bytes += Path(folder, name).lstat().st_size
            except OSError as error:
                unless_gone(error)
    return num_bytes
