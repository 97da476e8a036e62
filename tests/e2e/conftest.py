"""Fixtures: run folders that leave no process behind, and a finished run that all pytest-xdist processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_tools import FIRST_RUN, kill_all_of
from filelock import FileLock
from forked import require_exit
from slurm_tools import Launch, SlurmRun, submit
from testbed_cluster import Testbed


@pytest.fixture(autouse=True, scope="module")
def _whole_code(module_whole_code: None) -> None:
    """These tests start runs that execute their code snapshot, so the snapshot must contain all of it."""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs; processes left at the end are killed by their process IDs."""
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


def _make_working_dir(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for module in ("torch", "deepspeed", "numpy", "psutil", "pydantic", "tenacity", "xxhash"):
        (folder / f"{module}.py").write_text("raise ImportError('imported from the working directory')\n")
    return folder


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    """A working directory with modules that shadow a run's dependencies: another user may own such a folder."""
    return _make_working_dir(tmp_path / "work")


@pytest.fixture(scope="session")
def first_run(launch: Launch, launcher_cache: Path) -> Path:
    """A finished and exported run of FIRST_RUN on this machine, read-only. The first test that needs it starts it.

    The command imports nothing from its working directory.
    """
    root = launcher_cache.parent / "first-run"
    run = root / "runs/undisturbed"
    with FileLock(f"{root}.lock"):
        if not root.exists():
            saves = ("checkpoint.save_every=3", "checkpoint.keep_last=3")
            settings = (*FIRST_RUN, *saves, f"run.root={run.parent}", f"run.name={run.name}")
            try:
                done = launch(*settings, cwd=_make_working_dir(root / "work"), PYTHONSAFEPATH="1")
            finally:
                kill_all_of(root)
            require_exit(done)
            assert "exported to" in done.stdout
    return run
