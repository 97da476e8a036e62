"""Folders for runs, from which nothing is left running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_tools import kill_all_of
from slurm_tools import Launch, SlurmRun, submit
from testbed_cluster import Testbed


@pytest.fixture(autouse=True, scope="module")
def _whole_code(module_whole_code: None) -> None:
    """The runs of these tests execute their code."""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs; whatever still runs from it at the end is killed by its process id."""
    root = tmp_path / "runs"
    yield root
    kill_all_of(root)


@pytest.fixture(scope="module")
def module_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("runs")
    yield root
    kill_all_of(root)


@pytest.fixture
def begin(launch_here: Launch, slurm: Testbed, runs: Path) -> Callable[..., SlurmRun]:
    """Submit a short run on two nodes: `begin(NAME, *overrides, **environment)`."""
    return lambda name, *overrides, **env: submit(launch_here, slurm, runs, name, *overrides, **env)


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    """The folder of a command, with modules in it that a run imports elsewhere: the folder may belong to somebody else."""
    folder = tmp_path / "work"
    folder.mkdir()
    for module in ("torch", "deepspeed", "numpy", "psutil", "pydantic", "tenacity", "xxhash"):
        (folder / f"{module}.py").write_text("raise ImportError('imported from the working directory')\n")
    return folder
