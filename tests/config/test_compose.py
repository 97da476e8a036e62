"""Hydra's flags and override syntax work; malicious settings and folders cannot make `plan` run code or exhaust memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Launch, require_exit

from launcher.config.compose import Composed
from launcher.errors import Problem

pytestmark = pytest.mark.rest
Compose = Callable[..., list[Composed]]
Refused = Callable[..., list[Problem]]
CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass C: pass\n"


@pytest.fixture
def own_conf(tmp_path: Path) -> Path:
    """A user's folder of group options."""
    for group, option, text in (
        ("model", "mine", "# mine\nname: mine\npath: owner/mine\n"),
        (
            "experiment",
            "mine",
            "# @package _global_\ndefaults:\n  - override /model: tiny\noptim:\n  lr: 0.5\ndata:\n  max_length: 64\n",
        ),
    ):
        (tmp_path / "own" / group).mkdir(parents=True)
        (tmp_path / "own" / group / f"{option}.yaml").write_text(text)
    return tmp_path / "own"


def test_plus_before_a_group_changes_nothing(compose: Compose) -> None:
    assert compose("+cluster=slurm")[0].config == compose("cluster=slurm")[0].config


@pytest.mark.parametrize("position", [0, 3], ids=["first", "last"])
def test_a_multirun_composes_each_job(compose: Compose, position: int) -> None:
    overrides = ["+cluster=local", "model=tiny,qwen3_8b", "optim.lr=0.5,0.25"]
    jobs = compose(*overrides[:position], "-m", *overrides[position:])
    assert [(job.config.model.name, job.config.optim.lr) for job in jobs] == [
        ("tiny", 0.5),
        ("tiny", 0.25),
        ("qwen3_8b", 0.5),
        ("qwen3_8b", 0.25),
    ]
    assert "optim.lr=0.25" in jobs[1].overrides


def test_a_multirun_prints_only_the_plans(launch_here: Launch, tmp_path: Path) -> None:
    done = launch_here("plan", "-m", "model=tiny", "optim.lr=0.5,0.25", "data.packing=false", cwd=tmp_path)
    require_exit(done)
    assert [line.split()[:1] for line in done.stdout.splitlines()].count(["model"]) == 2
    assert all(line[:11].split()[0] == line[:11].strip() for line in done.stdout.splitlines())
    assert done.stderr in ("", "checking that this model sees no later tokens (once)\n")
    assert list(tmp_path.iterdir()) == []


def test_config_dir_adds_options_of_the_user(compose: Compose, own_conf: Path) -> None:
    (composed,) = compose("--config-dir", str(own_conf), "model=mine")
    assert composed.config.model.path == "owner/mine"


def test_options_on_hydras_search_path_are_accepted(
    compose: Compose, refused: Callable[..., list[Problem]], own_conf: Path
) -> None:
    (composed,) = compose(f"hydra.searchpath=[file://{own_conf}]", "model=mine")
    assert composed.config.model.path == "owner/mine"
    (problem,) = refused(f"hydra.searchpath=[file://{own_conf}]", "model=mne")
    assert problem.message == "model=mne: there is no such option"
    assert problem.remedy.startswith("did you mean mine?")


def test_an_experiment_wins_over_groups_and_the_command_line_over_it(compose: Compose, own_conf: Path) -> None:
    (composed,) = compose("--config-dir", str(own_conf), "experiment=mine")
    # optim/adamw.yaml and data/stdlib_docs.yaml set other values.
    assert (composed.config.optim.lr, composed.config.data.max_length, composed.config.model.name) == (0.5, 64, "tiny")
    (composed,) = compose("--config-dir", str(own_conf), "optim.lr=0.25", "experiment=mine", "model=qwen3_8b")
    assert (composed.config.optim.lr, composed.config.data.max_length, composed.config.model.name) == (0.25, 64, "qwen3_8b")


@pytest.mark.parametrize("key", ["_target_", "deepspeed.extra._target_", "model.config.a.b._target_"])
def test_a_target_is_refused_and_never_called(
    refused: Callable[..., list[Problem]], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"canary_{key.count('.')}_{len(key)}"
    (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'called')!r}, 'w').close()\ndef call(**kwargs): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (problem,) = refused(f"{key}={module}.call")
    assert problem.message == f"{key}: a setting must not name code to run; nothing was called"
    assert not (tmp_path / "called").exists()


def test_composing_restores_the_process_state(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    before = list(sys.argv), dict(os.environ), Path.cwd()
    compose("model=tiny")
    assert (list(sys.argv), dict(os.environ), Path.cwd()) == before


def test_composing_writes_nothing(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose("model=tiny")
    compose("-m", "model=tiny", "optim.lr=0.5,0.25")
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_hydras_own_section_calls_nothing(
    compose: Compose, marker: Path, shared: Callable[[str], tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, flags: tuple
) -> None:
    """Hydra's command line would call callbacks, the classes of logging, and targets in the parameters of its sweeper."""
    monkeypatch.syspath_prepend(marker.parent / "path")
    logging = "{version: 1, handlers: {h: {class: evil.C}, i: {(): evil.C}}, root: {handlers: [h, i]}}"
    section = {
        **{"mode": "MULTIRUN", "callbacks": "{mine: {_target_: evil.C}}", "sweeper": "{params: {x: {_target_: evil.C}}}"},
        **{"job_logging": logging, "hydra_logging": logging, "job": "{env_set: {LAUNCHER_TRUST_OWNERS: anyone}}"},
    }
    lines = "".join(f"  {key}: {value}\n" for key, value in section.items())
    assert len(compose(*flags, *shared(f"hydra:\n{lines}"), "model=tiny")) == 1
    assert not marker.exists()
    assert "LAUNCHER_TRUST_OWNERS" not in os.environ


def test_settings_of_hydra_are_refused(refused: Refused) -> None:
    (problem,) = refused("+hydra.callbacks.mine._target_=evil.C")
    assert problem.message == "+hydra.callbacks.mine._target_: Hydra only composes settings here"


def test_nothing_is_imported_from_the_working_directory(marker: Path, session_cache: None) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-m", "launcher", "plan", "model=tiny", "tracking=none", "-m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    require_exit(done)
    assert not marker.exists()


def test_a_pickled_job_of_hydra_is_not_loaded(refused: Refused) -> None:
    (problem,) = refused("--experimental-rerun=job.pickle")
    assert problem.message == "there is no flag --experimental-rerun"
