"""Where Ray Train keeps its state (cluster.storage_path): other users must not choose which files or servers it writes to.

Ray Train creates and replaces files of known names there (`attempt-001/.validate_storage_marker`), and follows links.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from launcher.errors import Problem, SubmitError
from launcher.security import ownership
from launcher.security.permissions import first_problem_above, tree
from launcher.security.port_owners import IS_STORAGE, server_problem
from launcher.security.storage_addresses import listener_problem
from launcher.security.trust import Trust
from launcher.shell_commands import shell_command

_SETTING = "cluster.storage_path"
# What names a server to pyarrow, through which Ray Train writes: parts of the address, and variables.
_PARAMETERS = ("endpoint_override", "blob_storage_authority", "dfs_storage_authority")
_S3, _GOOGLE = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), ("CLOUD_STORAGE_EMULATOR_ENDPOINT",)
_VARIABLES = {"s3": _S3, "gs": _GOOGLE, "gcs": _GOOGLE}


def require_own_storage(storage_path: str | None) -> None:
    """Reject storage in which other users could put links, or whose server is another user's process on this machine.

    Storage in the run directory (None) is checked with that.

    Raises:
        SubmitError: with the folder or the address.
    """
    if storage_path is not None and (problem := next(filter(None, _problems(storage_path)), None)) is not None:
        raise SubmitError(problem)


def _problems(storage_path: str) -> Iterator[Problem | None]:
    parts = urlsplit(storage_path)
    if storage_path.startswith("/") or parts.scheme == "file":
        folder = Path(storage_path if storage_path.startswith("/") else unquote(parts.path))
        yield _folder_problem(folder, ())
        for attempt in folder.glob("attempt-*"):
            yield _folder_problem(attempt, tree(attempt))
        return
    yield listener_problem(_SETTING, storage_path)
    for where, server in _servers(parts):
        yield server_problem(where, server, IS_STORAGE)


def _folder_problem(folder: Path, content: Iterator[Path] | tuple[()]) -> Problem | None:
    subject, trust = "Ray Train's storage", Trust.from_environ(os.environ)
    problem = ownership.folder_problem(subject, folder, content, may_be_hidden=True)
    if problem is None:
        return None
    if not os.path.lexists(folder) and first_problem_above(subject, folder, trust, may_be_hidden=True) is None:
        # In a sticky folder such as /tmp, others can create it first, but cannot replace it.
        return replace(problem, remedy=f"create it first: {shell_command('mkdir', '-p', '-m', '700', folder)}")
    return replace(problem, remedy=f"set {_SETTING} to a folder that only you can write to; or {problem.remedy}")


def _servers(parts: SplitResult) -> Iterator[tuple[str, str]]:
    """Yield where each server is set, and its address."""
    values = parse_qs(parts.query)
    yield from ((_SETTING, server) for name in _PARAMETERS for server in values.get(name, ()))
    yield from ((name, os.environ.get(name, "")) for name in _VARIABLES.get(parts.scheme, ()))
