"""The folders in which this user has started runs.

`clean` checks what the runs there use of the launcher's cache. If a run is found in another folder, messages name that folder.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import xxhash

from launcher import atomic_files
from launcher.data.cache_dir import cache_root
from launcher.errors import NoSuchRun
from launcher.security.folders import usable_part

_FOLDER = "run-folders"


def remember(folder: Path) -> None:
    """Record a folder of runs in the launcher's cache. An unwritable cache does not prevent a run from starting."""
    if (records := usable_part(cache_root() / _FOLDER, make=True)) is not None:
        record = records / xxhash.xxh3_64_hexdigest(str(folder).encode())
        with suppress(OSError):
            if not record.is_file():
                atomic_files.write_text(record, f"{folder}\n")


def recall() -> list[Path]:
    """Return the folders of runs that still exist."""
    folders: list[Path] = []
    if (records := usable_part(cache_root() / _FOLDER)) is None:
        return folders
    with suppress(OSError):
        for record in sorted(records.iterdir()):
            with suppress(OSError, UnicodeDecodeError):
                folder = Path(record.read_text(encoding="utf-8").strip())
                if folder.is_absolute() and folder.is_dir():
                    folders.append(folder)
    return folders


def with_root(error: NoSuchRun) -> NoSuchRun:
    """Return the error with the other folders that have a run of that name, or with the option that names a folder."""
    problem = error.problems[0]
    elsewhere = [str(folder) for folder in recall() if (folder / error.name / "plan.json").is_file()]
    if not elsewhere:
        if "--root" in problem.remedy:
            return error
        return NoSuchRun(replace(problem, remedy=f"{problem.remedy}; --root names another folder of runs"), error.name)
    remedy = f"a run of this name is in {' and in '.join(elsewhere)}: add {shlex.join(['--root', elsewhere[-1]])}"
    return NoSuchRun(replace(problem, remedy=remedy), error.name)
