"""The files in run.root that show the machines of a start that they share it, and tell a late machine of a refusal."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import atomic_files, json_records
from launcher.errors import LauncherError, Problem
from launcher.security import ownership
from launcher.security.trust import user_name

_MAX_REASON, _MAX_MARKER_BYTES = 4000, 64


@dataclass(frozen=True)
class StartRefusal:
    """Why node 0, on `host`, refused a start."""

    host: str
    reason: str


def marker(run: Path) -> Path:
    """Return the path of the file in run.root with the current start's number."""
    return run.parent / f".{run.name}.start"


def read_marker(run: Path) -> str:
    """Return the current start's number; empty if this machine sees none."""
    with suppress(OSError, ValueError):
        atomic_files.refresh_directory(run.parent)
    with suppress(OSError, ValueError):
        if is_of_trusted_owner(marker(run)):
            return atomic_files.read_short_text(marker(run), _MAX_MARKER_BYTES)
    return ""


def is_of_trusted_owner(file: Path) -> bool:
    """Return whether this user trusts the owner of a file, or of a link in its place; other users can guess its name.

    Raises:
        OSError: if the file does not exist.
    """
    return ownership.accepts_owner(file.lstat().st_uid)


def foreign_marker(run: Path) -> Problem | None:
    """Return a problem if another user created the number's file, which only they can remove from a sticky folder; else None."""
    with suppress(OSError):
        if not is_of_trusted_owner(file := marker(run)):
            owner = user_name(file.lstat().st_uid)
            remedy = f"choose another run.name, set run.root to a folder of your own, or ask {owner} to remove the file"
            return Problem(f"{owner} created the file through which these machines meet", str(file), run.name, remedy)
    return None


def not_shared(root: Path, host: str, head: str) -> Problem:
    """Return the problem of a machine that does not see what node 0 wrote."""
    return Problem(
        f"run.root is not shared: {host} does not see what {head} writes there",
        "run.root",
        str(root),
        "set run.root to a folder on storage that every machine mounts under the same path, such as NFS or a network volume",
    )


def _refusal_file(run: Path) -> Path:
    return run.parent / f".{run.name}.refused"


def write_refusal(run: Path, host: str, reason: str) -> None:
    """Leave the reason for machines that ask after node 0 has ended; a failed write is not an error."""
    with suppress(OSError):
        json_records.write(_refusal_file(run), StartRefusal(host, reason[:_MAX_REASON]))


def remove_refusal(run: Path) -> None:
    with suppress(OSError):
        _refusal_file(run).unlink(missing_ok=True)


def read_refusal(run: Path, max_age_s: float) -> StartRefusal | None:
    """Return the newest refusal unless it is older than `max_age_s`; a start that has begun since removes it."""
    file = _refusal_file(run)
    with suppress(OSError, LauncherError):
        # Use the file system's times, because machine clocks differ.
        age_s = atomic_files.refresh_directory(run.parent) - file.stat().st_mtime
        return json_records.read(StartRefusal, file) if age_s <= max_age_s and is_of_trusted_owner(file) else None
    return None
