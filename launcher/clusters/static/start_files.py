"""The files in run.root by which the machines of a start see that they share it, and by which a late one learns of a refusal."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import atomic_files, json_records, run_store
from launcher.errors import LauncherError, Problem

_MAX_REASON, _MAX_MARKER_BYTES = 4000, 64


@dataclass(frozen=True)
class StartRefusal:
    """Why node 0, on `host`, has refused a start."""

    host: str
    reason: str


def marker(run: Path) -> Path:
    """Return the file in run.root that has the number of the start that goes on."""
    return run.parent / f".{run.name}.start"


def read_marker(run: Path) -> str:
    """Return the number of the start that goes on; empty where this machine sees none."""
    with suppress(OSError, ValueError):
        run_store.refresh_directory(run.parent)
    with suppress(OSError, ValueError):
        return atomic_files.read_short_text(marker(run), _MAX_MARKER_BYTES)
    return ""


def not_shared(root: Path, host: str, head: str) -> Problem:
    """Return the problem of a machine that does not see what node 0 has written."""
    return Problem(
        f"run.root is not shared: {host} does not see what {head} writes there",
        "run.root",
        str(root),
        "set run.root to a folder on storage that every machine mounts under the same path, such as NFS or a network volume",
    )


def _refusal_file(run: Path) -> Path:
    return run.parent / f".{run.name}.refused"


def write_refusal(run: Path, host: str, reason: str) -> None:
    """Leave the reason for machines that begin to ask when node 0 has ended; storage that cannot take it is no failure."""
    with suppress(OSError):
        json_records.write(_refusal_file(run), StartRefusal(host, reason[:_MAX_REASON]))


def remove_refusal(run: Path) -> None:
    with suppress(OSError):
        _refusal_file(run).unlink(missing_ok=True)


def read_refusal(run: Path, max_age_s: float) -> StartRefusal | None:
    """Return the newest refusal, unless it is older than that or a start has begun since, which removes it."""
    file = _refusal_file(run)
    with suppress(OSError, LauncherError):
        # The times of the file system: the clocks of machines differ.
        age_s = run_store.refresh_directory(run.parent) - file.stat().st_mtime
        return json_records.read(StartRefusal, file) if age_s <= max_age_s else None
    return None
