"""Hydra's flags and override syntax work; malicious settings and folders cannot make `plan` run code or exhaust memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from forked import Launch, require_exit

from launcher.cli.main import main
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


def test_cfg_job_prints_the_composed_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=tiny", "--cfg", "job"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["name"] == "tiny"
    assert "hydra" not in printed


@pytest.mark.parametrize("tokens", [["--info"], ["--info", "searchpath"]])
def test_info_prints_and_starts_nothing(capsys: pytest.CaptureFixture[str], tokens: list[str], tmp_path: Path) -> None:
    assert main([f"run.root={tmp_path}/runs", *tokens]) == 0
    assert "conf" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


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
    require_exit(done)
    assert not marker.exists()


def test_a_pickled_job_of_hydra_is_not_loaded(refused: Refused) -> None:
    (problem,) = refused("--experimental-rerun=job.pickle")
    assert problem.message == "there is no flag --experimental-rerun"
