"""Where the launcher keeps what it has made or fetched on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """$LAUNCHER_CACHE, else $XDG_CACHE_HOME/launcher, else ~/.cache/launcher."""
    if root := os.environ.get("LAUNCHER_CACHE"):
        return Path(root).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "launcher"
