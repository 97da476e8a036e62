"""Malicious settings and folders that try to make `plan` run code or exhaust memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import Problem

pytestmark = pytest.mark.rest

Refused = Callable[..., list[Problem]]
CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass C: pass\n"


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file created when a module in the working directory, or `evil` in the folder `path`, is imported."""
    (tmp_path / "here").mkdir()
    (tmp_path / "path").mkdir()
    (tmp_path / "path/evil.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    for name in ("evil", "yaml", "submitit"):
        (tmp_path / f"here/{name}.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    (tmp_path / "here/hydra_plugins").mkdir()
    (tmp_path / "here/hydra_plugins/plugin.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "ran"


@pytest.fixture
def shared(tmp_path: Path) -> Callable[[str], tuple[str, ...]]:
    """Return the arguments that select an experiment with the given content in a shared folder."""

    def choose(text: str) -> tuple[str, ...]:
        (tmp_path / "shared/experiment").mkdir(parents=True)
        (tmp_path / "shared/experiment/mine.yaml").write_text(f"# @package _global_\n{text}")
        return "--config-dir", str(tmp_path / "shared"), "experiment=mine"

    return choose


@pytest.mark.parametrize(("flags", "by_file"), [((), False), (("-m",), True)])
def test_callbacks_are_refused_and_not_imported(
    refused: Refused,
    marker: Path,
    shared: Callable[[str], tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple,
    by_file: bool,
) -> None:
    monkeypatch.syspath_prepend(marker.parent / "path")
    words = (
        shared("hydra:\n  callbacks:\n    mine:\n      _target_: evil.C\n")
        if by_file
        else ("+hydra.callbacks.mine._target_=evil.C",)
    )
    (problem,) = refused(*flags, *words)
    assert problem.message == "hydra.callbacks: a setting must not name code to run; nothing was called"
    assert problem.value == "mine"
    assert not marker.exists()


@pytest.mark.parametrize(("by_flag", "params"), [(False, "{_target_: evil.C}"), (True, "{x: {_target_: evil.C}}")])
def test_what_runs_a_sweep_calls_nothing(
    refused: Refused,
    marker: Path,
    shared: Callable[[str], tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    by_flag: bool,
    params: str,
) -> None:
    """Hydra calls the targets in its sweeper's parameters, and a file can also start a sweep."""
    monkeypatch.syspath_prepend(marker.parent / "path")
    words = shared(f"hydra:\n  mode: MULTIRUN\n  sweeper:\n    params: {params}\n")
    problems = refused(*(("-m",) if by_flag else ()), *words, "model=tiny")
    assert not marker.exists()
    assert "hydra.sweeper: a setting must not name code to run; nothing was called" in {problem.message for problem in problems}


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("hydra.job.env_set", "job: {env_set: {LAUNCHER_TRUST_OWNERS: anyone}}"),
        ("hydra.sweep.subdir", "sweep: {subdir: ../app}"),
    ],
)
def test_a_single_job_of_a_sweep_sets_no_variables_and_writes_no_files(
    refused: Refused,
    shared: Callable[[str], tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    line: str,
) -> None:
    """The `hydra` section of an experiment is absent from the sweep's own settings, so each job is checked."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    flag, folder, _ = shared(f"hydra:\n  {line}\n")
    (tmp_path / "shared/experiment/other.yaml").write_text("# @package _global_\n")
    (problem,) = refused("-m", flag, folder, "experiment=other,mine", "model=tiny")
    assert problem.where == key
    assert not [*tmp_path.rglob("app")]


@pytest.mark.parametrize(("section", "flags"), [("job_logging", ()), ("hydra_logging", ("-m",))])
def test_classes_of_the_logging_are_not_imported(
    compose: Callable,
    marker: Path,
    shared: Callable[[str], tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    flags: tuple,
) -> None:
    monkeypatch.syspath_prepend(marker.parent / "path")
    logging = (
        "{version: 1, handlers: {h: {class: evil.C}, i: {(): evil.C}, j: {class: logging.StreamHandler, stream: ext://evil.C}}"
    )
    words = shared(f"hydra:\n  {section}: {logging}, root: {{handlers: [h, i, j]}}}}\n")
    compose(*flags, *words, "model=tiny")
    assert not marker.exists()


def test_nothing_is_imported_from_the_working_directory(marker: Path, session_cache: None) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-m", "launcher", "plan", "model=tiny", "tracking=none", "-m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not marker.exists()


def test_a_pickled_job_of_hydra_is_not_loaded(refused: Refused) -> None:
    (problem,) = refused("--experimental-rerun=job.pickle")
    assert problem.message == "there is no flag --experimental-rerun"
