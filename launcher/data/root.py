"""Where the launcher keeps what it has made or fetched on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import xxhash


def cache_root() -> Path:
    """$LAUNCHER_CACHE, else $XDG_CACHE_HOME/launcher, else ~/.cache/launcher."""
    if root := os.environ.get("LAUNCHER_CACHE"):
        return Path(root).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "launcher"


def source_folder(*parts: object) -> Path:
    """Where what is known or fetched of a source that lies elsewhere is kept; `parts` say what it is."""
    return cache_root() / "sources" / xxhash.xxh3_128_hexdigest(json.dumps([str(part) for part in parts]).encode())
