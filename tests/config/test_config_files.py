"""Mistakes in config group files are reported with file, line and remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import Problem

Refused = Callable[..., list[Problem]]
GLOBAL = "# @package _global_\n"


@pytest.fixture
def problems_of(refused: Refused, tmp_path: Path) -> Callable[..., list[Problem]]:
    """Return the problems of a command line with an experiment of the given text; FILE stands for its path."""

    def problems(text: str, *tokens: str) -> list[Problem]:
        file = tmp_path / "conf" / "experiment" / "mine.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        shortened = refused("model=tiny", "--config-dir", str(tmp_path / "conf"), "experiment=mine", *tokens)
        return [Problem(p.message, p.where.replace(str(file), "FILE"), p.value, p.remedy) for p in shortened]

    return problems


def test_a_value_that_an_experiment_leaves_open_is_missing_although_a_group_has_one(
    problems_of: Callable[..., list[Problem]],
) -> None:
    (problem,) = problems_of(f"{GLOBAL}optim:\n  lr: ???\n")
    assert (problem.message, problem.where) == ("optim.lr: a value is required and none was given", "FILE:3")
    assert problem.remedy == "add optim.lr=... to the command line"


def test_a_value_that_an_experiment_leaves_open_comes_from_the_command_line(compose: Callable[..., list], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"{GLOBAL}optim:\n  lr: ???\n")
    (composed,) = compose("model=tiny", "--config-dir", str(tmp_path), "experiment=mine", "optim.lr=0.5")
    assert composed.config.optim.lr == 0.5


@pytest.mark.parametrize("header", ["", "# my experiment\n", "# package _global_\n"])
@pytest.mark.parametrize("text", ["optim:\n  lr: 0.5\n", ""])
def test_an_experiment_without_a_package_is_told_so(problems_of: Callable[..., list[Problem]], header: str, text: str) -> None:
    package, other = problems_of(header + text, "run.seed=x")
    assert package.message == "experiment=mine: the first line of its file is not `# @package _global_`, so it sets nothing"
    assert (package.where, package.remedy) == ("FILE:1", "write `# @package _global_` as the first line of the file")
    assert other.message == "run.seed: must be a whole number"


@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        (
            "run:\n  name: ${tracking.group}\ntracking:\n  group: ${run.name}\n",
            "these settings refer to each other: run.name -> tracking.group -> run.name",
            "run.name (FILE:3), tracking.group (FILE:5)",
        ),
        ("run:\n  name: ${run.name}\n", "this setting refers to itself: run.name -> run.name", "run.name (FILE:3)"),
        (
            "run:\n  name: a-${tracking.group}\ntracking:\n  group: ${run.root}\n",
            "these settings refer to each other: run.name -> tracking.group -> run.root -> run.name",
            "run.name (FILE:3), tracking.group (FILE:5), run.root (command line)",
        ),
    ],
)
def test_settings_that_refer_to_each_other_are_named(
    problems_of: Callable[..., list[Problem]], text: str, message: str, where: str
) -> None:
    (problem,) = problems_of(GLOBAL + text, "run.root=${run.name}")
    assert (problem.message, problem.where) == (message, where)
    assert problem.remedy.startswith("write a value without a reference for run.name")


def test_a_key_that_stands_twice_names_both_lines(problems_of: Callable[..., list[Problem]]) -> None:
    lr, run = problems_of(f"{GLOBAL}optim:\n  lr: 1e-5\n  lr: 2e-5\nrun:\n  seed: 1\nrun:\n  root: x\n")
    assert (lr.message, lr.where) == ("optim.lr: the file sets this key twice, in lines 3 and 4", "FILE:4")
    assert (run.message, run.where) == ("run: the file sets this key twice, in lines 5 and 7", "FILE:7")


def test_a_tab_is_named(problems_of: Callable[..., list[Problem]]) -> None:
    (problem,) = problems_of(f"{GLOBAL}optim:\n\tlr: 1e-5\n")
    assert problem.message == "the indentation contains a tab, which YAML does not allow"
    assert (problem.where, problem.remedy) == ("FILE:3", "indent this line with spaces")


def test_other_mistakes_in_yaml_name_line_and_column(problems_of: Callable[..., list[Problem]]) -> None:
    (problem,) = problems_of(f"{GLOBAL}optim: [1, 2\nrun: 3\n")
    assert problem.message.startswith("the file is not valid YAML: while parsing a flow sequence, expected ")
    assert (problem.where, problem.value) == ("FILE:3:4", "run: 3")


def test_a_line_with_a_secret_that_is_not_valid_yaml_is_not_shown(problems_of: Callable[..., list[Problem]]) -> None:
    (problem,) = problems_of(f"{GLOBAL}optim: [1, 2\napi_key: hunter2\n")
    assert "hunter2" not in str(problem)
