"""Errors are one block of text with remedies and suggestions, and their commands can be pasted into a shell."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from launcher.cli.start_run import show_started
from launcher.clusters.detached_process import resume_hint
from launcher.config.schema import _NAMES_ELSEWHERE, settings, suggest_setting
from launcher.config.sections.data import Source
from launcher.data.sources.reading import read_documents
from launcher.errors import DataError, Problem, causes, did_you_mean
from launcher.plan.run_dir import RunDir
from launcher.shell_commands import launcher_command

REPO = Path(__file__).resolve().parents[1]


def test_a_problem_moves_no_cursor_and_hides_nothing() -> None:
    problem = Problem("\x1b[2Jé 日本", "a\udcff.jsonl:1\r", "\u202eb\x9b0m", "a\tb\nc")
    assert str(problem) == ("\\x1b[2Jé 日本\n  where:  a\\udcff.jsonl:1\\r\n  value:  \\u202eb\\x9b0m\n  remedy: a\tb\nc")


def test_the_causes_of_an_error_end_if_it_is_among_them() -> None:
    error, inner = ValueError("outer"), KeyError("inner")
    error.__cause__, inner.__context__ = inner, error
    assert list(causes(error)) == [error, inner]
    inner.__suppress_context__ = True
    error.__cause__ = None
    assert list(causes(inner)) == [inner, error]
    assert list(causes(inner, with_suppressed=False)) == [inner]


@pytest.mark.parametrize(
    "row",
    [
        {"\x1b]0;owned\x07": "a"},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "\x1b[1A", "arguments": "no"}]}]},
    ],
)
def test_keys_and_names_of_rows_do_not_reach_the_terminal_raw(tmp_path: Path, row: dict[str, object]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError) as caught:
        list(read_documents(Source(path=str(path))))
    assert "\\x1b" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optim.lrr", "optim.lr"),
        ("train.max_step", "train.max_steps"),
        ("train.maxsteps", "train.max_steps"),
        ("train.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("epochs", "train.epochs"),
        ("dta.max_length", "data.max_length"),
        ("data.sources[].pth", "data.sources[].path"),
        ("qqqqq", None),
        # Suggesting a section does not help someone who typed a key inside it.
        ("train.qqqqq", None),
    ],
)
def test_a_setting_that_was_meant(word: str, meant: str | None) -> None:
    assert did_you_mean(word, list(settings())) == (f"did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("learning-rate", "optim.lr"),
        ("optim.learnig_rate", "optim.lr"),
        ("batch_size", "train.global_batch_size"),
        ("train.batch_size", "train.global_batch_size"),
        ("per_device_train_batch_size", "train.micro_batch_size"),
        ("model.max_lenght", "data.max_length"),
        ("train.save_evry", "checkpoint.save_every"),
        ("optim.lrr", "optim.lr"),
        ("qqqqq", None),
    ],
)
def test_a_setting_is_suggested_across_sections_and_by_its_names_in_other_trainers(key: str, meant: str | None) -> None:
    assert suggest_setting(key) == (f"did you mean {meant}?" if meant else "")


def test_names_in_other_trainers_stand_for_settings_and_are_none_themselves() -> None:
    last_parts = {name.rpartition(".")[2] for name in settings() if "." in name}
    for setting, names in _NAMES_ELSEWHERE.items():
        assert setting in settings()
        assert last_parts.isdisjoint(names.split()), setting


def test_a_name_that_several_sections_know() -> None:
    assert did_you_mean("kind", list(settings())) == "did you mean cluster.kind or tracking.kind?"


def test_every_setting_has_a_type_and_a_meaning() -> None:
    for setting in settings().values():
        assert setting.type, setting
        assert setting.meaning.endswith("."), setting


@pytest.mark.parametrize("name", ["run", "my run", "it's $HOME; *"])
def test_a_run_path_is_one_word_of_the_command(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / name
    assert shlex.split(launcher_command("resume", run, "--step", "3")) == [
        *("python", "-m", "launcher", "resume", str(run)),
        *("--step", "3"),
    ]
    assert shlex.split(resume_hint(RunDir(run)).removeprefix("continue with: "))[-1] == str(run)
    show_started(RunDir(run), [])
    for line in capsys.readouterr().out.splitlines()[2:]:
        assert str(run) in shlex.split(line), line


def test_every_command_with_a_value_is_made_by_that_function() -> None:
    texts = [
        f"{file.relative_to(REPO)}:{node.lineno}: {ast.unparse(node)}"
        for file in sorted((REPO / "launcher").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.JoinedStr) and "prog=" not in file.read_text().splitlines()[node.lineno - 1]
        for part, following in zip(node.values, node.values[1:], strict=False)
        if isinstance(part, ast.Constant) and re.search(r"python -m launcher[\w.]*( [\w-]+)* ?$", str(part.value))
        if isinstance(following, ast.FormattedValue)
    ]
    assert texts == []
