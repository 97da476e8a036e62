"""Paths that a hostile folder may hold in place of regular files."""

from __future__ import annotations

import os
from pathlib import Path


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")
