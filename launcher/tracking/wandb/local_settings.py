"""The server that gets the user's W&B key: settings in the working directory, or a variable, name it."""

from __future__ import annotations

import configparser
import ctypes
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher.errors import Problem
from launcher.security import ownership
from launcher.security.library_caches import WANDB, find_usable_folders
from launcher.security.port_owners import server_problem

# W&B takes the first of these folders that exists.
_FOLDERS = (".wandb", "wandb")
_SERVER, _CONFIG_FOLDER = "WANDB_BASE_URL", "WANDB_CONFIG_DIR"
# Variables that name a file with a login: its account gets the metrics and samples of a run.
_LOGINS = ("NETRC", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CREDENTIALS_FILE")
_SUBJECT = "the settings file that W&B reads in the working directory"
_CLONE_FS = 0x200


def find_problem() -> Problem | None:
    """Return why the server that would get the key is not trusted, or None if it is.

    Other users may have written W&B settings in the working directory or in the folder that WANDB_CONFIG_DIR names, or the file
    with a login that another variable names. They may listen at the server's address on this machine.
    """
    files = _files()
    problem = next(filter(None, map(_problem_of, files)), None) if any(map(os.path.lexists, files)) else None
    if problem is not None:
        return replace(problem, remedy=f"change to a folder of your own (cd); or {problem.remedy}")
    # A variable may name a folder that others can write to or create first, such as /tmp/wandb.
    file = _own_settings()
    is_read = os.environ.get(_CONFIG_FOLDER) or os.path.lexists(file)
    if is_read and (problem := ownership.file_problem("the settings file of W&B", file, may_be_hidden=True)) is not None:
        return replace(problem, remedy=f"set {_CONFIG_FOLDER} to a folder of your own; or {problem.remedy}")
    return ownership.named_file_problem(_LOGINS) or server_problem(*_server())


def _server() -> tuple[str, str]:
    """Return where the server's address is set, and the address: `wandb login --host` writes it to a file of settings."""
    if address := os.environ.get(_SERVER):
        return _SERVER, address
    # W&B takes the folder of the working directory first.
    for file in (*_files(), _own_settings()):
        parser = configparser.ConfigParser(interpolation=None)
        with suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(file)
            if address := parser.get("default", "base_url", fallback=""):
                return str(file), address
    return _SERVER, ""


def leave_folder_of_others(only_this_thread: bool = False) -> None:
    """Change to the root directory if other users could write W&B settings to the working directory, now or later.

    W&B's logs and tables go to a private folder if other users could have put links into its own. Call it before W&B's package
    reads its settings. With `only_this_thread`, other threads keep their working directory.
    """
    # Commands have the user's environment; that of a worker process already names usable folders.
    os.environ.update(find_usable_folders(WANDB, os.environ))
    if all(_problem_of(file) is None for file in _files()):
        return
    # Containers may forbid per-thread working directories. Then only what `find_problem` finds is rejected.
    if not only_this_thread or ctypes.CDLL(None).unshare(_CLONE_FS) == 0:
        os.chdir("/")


def _own_settings() -> Path:
    # Unlike Path.expanduser, this leaves the name as it is for a user without a home directory.
    return Path(os.path.expanduser(os.environ.get(_CONFIG_FOLDER) or "~/.config/wandb")) / "settings"


def _files() -> list[Path]:
    return [Path.cwd() / folder / "settings" for folder in _FOLDERS]


def _problem_of(file: Path) -> Problem | None:
    return ownership.file_problem(_SUBJECT, file)
