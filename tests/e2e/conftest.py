"""Folders for runs, from which nothing is left running."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from e2e_tools import processes_of


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs; whatever still runs from it at the end is killed by its process id."""
    root = tmp_path / "runs"
    yield root
    for process in processes_of(root):
        process.kill()


@pytest.fixture(scope="module")
def module_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("runs")
    yield root
    for process in processes_of(root):
        process.kill()
