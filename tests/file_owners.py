"""Files of other users, which only root can create."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from missing_program import skip_or_fail

# IDs that no user of a fresh machine has.
MALLORY, TEAM = 54321, 54322


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        skip_or_fail("only root can give files to another user: run pytest as root")


def give(path: Path, uid: int = MALLORY) -> None:
    """Give a folder and its contents to another user."""
    for one in (path, *path.rglob("*")):
        os.chown(one, uid, -1, follow_symlinks=False)
