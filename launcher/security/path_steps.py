"""The folders and links that the system traverses to open a file: whoever can change one of them chooses the file."""

from __future__ import annotations

import os
from pathlib import Path

# Linux's limit; https://man7.org/linux/man-pages/man7/path_resolution.7.html
MAX_LINKS = 40


def path_steps(path: Path) -> list[Path]:
    """Return each folder and link from the root to a file, in the order of traversal, and finally the file itself.

    If links form a cycle, the last entry is a link.
    """
    steps, current, num_links = list[Path](), Path("/"), 0
    names = list(reversed(path.absolute().parts[1:]))
    while names:
        steps.append(current)
        name = names.pop()
        if name == "..":
            current = current.parent
        elif (entry := current / name).is_symlink() and num_links < MAX_LINKS:
            num_links += 1
            steps.append(entry)
            target = Path(os.readlink(entry))
            current = Path("/") if target.is_absolute() else current
            names += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        else:
            current = entry
    return [*dict.fromkeys(step for step in steps if step != current), current]
