from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.config.compose import Composed
from launcher.config.origin import Origins
from launcher.errors import Problem

FILES = {
    "config.yaml": "defaults:\n  - _self_\nrun:\n  seed: 1\ntrain:\n  epochs: 1\n",
    "model/big.yaml": "# big\nname: big\nconfig:\n  hidden_size: 64\n  layers: [1, 2]\n",
    "data/mine.yaml": "path: x\nsources:\n  - name: a\n    path: ${data.path}\n  - name: b\n    path: ${run.seed}/b\n",
    "data/demo.yaml": "# @package _global_\n# the demo\ndata:\n  path: x\noptim:\n  lr: 1\n",
    "optim/adamw.yaml": "lr: 2\nbetas: [0.9, 0.95]\n",
    "experiment/one.yaml": "# @package _global_\ndefaults:\n  - override /data: demo\noptim:\n  betas:\n    - 0.1\n    - 0.2\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def origins(folder: Path, *overrides: str, **choices: str | None) -> Origins:
    # In Hydra's order: the last option composed comes first.
    chosen = {"experiment": None, "data": "demo", "optim": "adamw", "model": "big", "hydra/launcher": "basic"} | choices
    return Origins(overrides=overrides, choices=chosen, folders=(folder,))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("run.seed", "config.yaml:4"),
        ("train.epochs", "config.yaml:6"),
        ("train", "config.yaml:5"),
        ("model.name", "model/big.yaml:2"),
        ("model.config.hidden_size", "model/big.yaml:4"),
        ("model.config.layers[1]", "model/big.yaml:5"),
        # A file with the package _global_ uses full keys, and data is composed after optim.
        ("data.path", "data/demo.yaml:4"),
        ("optim.lr", "data/demo.yaml:6"),
        ("optim.betas", "optim/adamw.yaml:2"),
        ("nowhere.at_all", ""),
        ("run.name", ""),
    ],
)
def test_the_origin_is_the_file_that_was_composed_last(folder: Path, key: str, expected: str) -> None:
    assert origins(folder).of(key) == (f"{folder}/{expected}" if expected else "")


def test_an_experiment_comes_before_the_groups(folder: Path) -> None:
    found = origins(folder, experiment="one")
    assert found.of("optim.betas[1]") == f"{folder}/experiment/one.yaml:7"
    assert found.of("optim.lr") == f"{folder}/data/demo.yaml:6"


def test_the_origin_of_an_interpolation_is_that_of_its_source(folder: Path) -> None:
    assert origins(folder, data="mine").resolve("data.sources[0].path") == ("data.path", f"{folder}/data/mine.yaml:1")
    assert origins(folder, "data.path=y", data="mine").resolve("data.sources[0].path") == ("data.path", "command line")
    # A value that contains more than a reference has its own location.
    assert origins(folder, data="mine").of("data.sources[1].path") == f"{folder}/data/mine.yaml:6"


@pytest.mark.parametrize("override", ["optim.lr=3", "+optim.lr=3", "++optim.lr=3"])
def test_the_command_line_comes_first(folder: Path, override: str) -> None:
    assert origins(folder, override).of("optim.lr") == "command line"


def test_overrides_of_other_keys_are_no_origin(folder: Path) -> None:
    found = origins(folder, "optim=adamw", "optim.lr_max=3", "model.config={a: 1}")
    assert found.of("optim.lr") == f"{folder}/data/demo.yaml:6"
    assert found.of("model.config.a") == "command line"


def test_paths_below_the_working_directory_are_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert origins(folder).of("run.seed") == "config.yaml:4"


def test_located_adds_the_origin_to_a_problem(folder: Path) -> None:
    problem = Problem("data.sources[0].path is missing", "data.sources[0].path", "y", "set data.sources[0].path")
    located = origins(folder, "data.path=y", data="mine").located(problem)
    assert located == Problem("data.path is missing", "data.path (command line)", "y", "set data.path")
    other = Problem("no host", "node-1", "", "wait")
    assert origins(folder).located(other) == other


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        (["model.path=./models/My model (1)/"], "My-model-1"),
        (["model.path=Qwen/Qwen3-8B"], "Qwen3-8B"),
        (["model.path=package:some_module/folder/name.Q4_1.gguf"], "name.Q4_1"),
        (["model.path=run:first@7"], "first"),
        (["model.path=Qwen/Qwen3-8B", "model.name=mine"], "mine"),
        (["model=llama3_1_8b", "model.path=/models/copy"], "llama3_1_8b"),
        ([], "smollm2_135m"),
    ],
)
def test_a_run_is_named_after_a_model_that_is_given_by_its_path_alone(
    compose: Callable[..., list[Composed]], tokens: list[str], name: str
) -> None:
    quoted = [token.replace("./models/My model (1)/", "'./models/My model (1)/'") for token in tokens]
    (composed,) = compose(*quoted)
    assert composed.config.model.name == name
