"""The storage under a path: its file system type, and the closest existing folder."""

from __future__ import annotations

import re
from pathlib import Path


def filesystem_type(path: Path, mountinfo: str) -> str:
    """Return the type of the file system of `path`, which need not exist, from the text of /proc/self/mountinfo.

    See proc_pid_mountinfo(5): the mount point is the fifth field, the type follows the hyphen.
    """
    resolved = path.resolve()
    innermost = (Path("/"), "")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        # Special characters, such as spaces, are octal escapes.
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4]))
        # A later mount hides an earlier one at the same point.
        if resolved.is_relative_to(point) and len(point.parts) >= len(innermost[0].parts):
            innermost = (point, after.split()[0])
    return innermost[1]


def existing_folder(path: Path) -> Path:
    """Return the path itself or its closest existing parent folder."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
