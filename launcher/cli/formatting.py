"""Words, tables and JSON that all verbs write in one way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.plan.run_dir import RunDir
from launcher.run_records import Status


def as_json(value: Any, indent: int | None = 2) -> str:
    """JSON that every parser reads: a number that it has no word for (NaN, infinity) is null, as in metrics.jsonl."""

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {name: plain(of) for name, of in part.items()}
        if isinstance(part, list | tuple):
            return [plain(of) for of in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def whereabouts(run: RunDir, status: Status, attempt: int) -> str:
    """Which job or process an attempt runs in, where, whose, and since when."""
    job = status.job or {}
    begun = job.get("started")
    if "pid" in job:
        place = f"process {job['pid']} on {job.get('host')}"
    elif "id" in job:
        place = f"job {job['id']}" + (f" on {', '.join(job['nodes'])}" if job.get("nodes") else "")
    else:
        place = "not placed yet"
    if begun is None:
        file = run.attempt(attempt) / "attempt.json"
        begun = file.stat().st_mtime if file.is_file() else status.updated_at
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(begun)))
    return f"attempt {attempt}, {place}, of user {_owner(run.root)}, since {since}"


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:
        return str(path.stat().st_uid)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under their columns' names; a name that begins with > stands, like its values, at the right."""
    names = [name.removeprefix(">") for name in columns]
    widths = [max(map(len, cells)) for cells in zip(names, *rows, strict=True)]
    sides = [">" if name.startswith(">") else "<" for name in columns]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in (names, *rows)
    ]


def size(num_bytes: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes} bytes"


def short(path: str | Path) -> str:
    """A path relative to where the user stands, where that is shorter to read."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)
