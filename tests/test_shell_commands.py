"""Commands that the launcher prints can be pasted into a shell."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from launcher.cli.start_run import show_started
from launcher.clusters.detached_process import resume_hint
from launcher.plan.run_dir import RunDir
from launcher.shell_commands import launcher_command

REPO = Path(__file__).resolve().parents[1]


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
