"""The closest existing folder of a path."""

from pathlib import Path


def existing_folder(path: Path) -> Path:
    """Return the path itself or its closest existing parent folder."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
