"""What lies beside the checkpoints of a run and is none: saves that did not end, and what was set aside."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint import durable, store

_WHAT = {
    ".saving-step-": "a save that did not end",
    f"{durable.REPLACED}step-": "a checkpoint that another has replaced",
    durable.REMOVING: "a removal that did not end",
    f"{store.ASIDE}step-": "set aside when the run went back to an earlier step",
    f"{store.DAMAGED}step-": "set aside as damaged",
}


@dataclass(frozen=True)
class Leftover:
    """A directory beside the checkpoints, in words, and the bytes of its files."""

    path: Path
    what: str
    bytes: int

    def as_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "what": self.what, "bytes": self.bytes}


def leftovers(root: Path) -> list[Leftover]:
    """What is left under `root` besides checkpoints; directories of other names are not this launcher's."""
    in_use = {checkpoint.path for checkpoint in store.list_checkpoints(root)}
    found = sorted(root.iterdir()) if root.is_dir() else []
    return [
        Leftover(path, what, disk_bytes(path))
        for path in found
        for prefix, what in _WHAT.items()
        if path.name.startswith(prefix) and path not in in_use and path.is_dir()
    ]


def remove(path: Path) -> None:
    """Remove a checkpoint or a leftover, in a run that nobody writes to."""
    if path.name.startswith(durable.REMOVING):
        shutil.rmtree(path, ignore_errors=True)
    else:
        durable.remove_directory(path)


def disk_bytes(path: Path) -> int:
    """Bytes of all files under `path`."""
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
