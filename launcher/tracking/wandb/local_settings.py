"""The server that gets the user's W&B key: settings in the working directory, or a variable, name it."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from pathlib import Path

from launcher.errors import Problem
from launcher.security import ownership
from launcher.security.port_owners import server_problem

# W&B takes the first of these folders that exists.
_FOLDERS = (".wandb", "wandb")
_SERVER = "WANDB_BASE_URL"
_SUBJECT = "the settings file that W&B reads in the working directory"
_CLONE_FS = 0x200


def find_problem() -> Problem | None:
    """Return why the server that would get the key is not trusted, or None if it is.

    Other users may have written W&B settings in the working directory, or may listen at WANDB_BASE_URL on this machine.
    """
    if problem := server_problem(_SERVER, os.environ.get(_SERVER, "")):
        return problem
    files = _files()
    if not any(map(os.path.lexists, files)):
        return None
    problem = next(filter(None, map(_problem_of, files)), None)
    return problem and replace(problem, remedy=f"change to a folder of your own (cd); or {problem.remedy}")


def leave_folder_of_others(only_this_thread: bool = False) -> None:
    """Change to the root directory if other users could write W&B settings to the working directory, now or later.

    Call it before W&B's package reads its settings. With `only_this_thread`, other threads keep their working directory.
    """
    if all(_problem_of(file) is None for file in _files()):
        return
    # Containers may forbid per-thread working directories. Then only what `find_problem` finds is rejected.
    if not only_this_thread or ctypes.CDLL(None).unshare(_CLONE_FS) == 0:
        os.chdir("/")


def _files() -> list[Path]:
    return [Path.cwd() / folder / "settings" for folder in _FOLDERS]


def _problem_of(file: Path) -> Problem | None:
    return ownership.file_problem(_SUBJECT, file)
