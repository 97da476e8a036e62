"""Folders for runs, from which nothing is left running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_tools import kill_all_of
from slurm_tools import Launch, SlurmRun, submit
from testbed_cluster import Testbed


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


@pytest.fixture(scope="session")
def undisturbed(launch: Launch, slurm_cluster: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two Slurm nodes that was left alone."""
    run = submit(launch, slurm_cluster, tmp_path_factory.mktemp("runs"), "undisturbed")
    run.await_completed()
    assert run.causes() == ["completed"]
    return run.path


@pytest.fixture
def begin(launch: Launch, slurm: Testbed, runs: Path) -> Callable[..., SlurmRun]:
    """Submit a short run on two nodes: `begin(NAME, *overrides, **environment)`."""
    return lambda name, *overrides, **env: submit(launch, slurm, runs, name, *overrides, **env)
