"""The verb data as a person meets it, in a process of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
SETTINGS = ("model=tiny", "data=jsonl", "data.max_length=128", "data.workers=1", "tracking=none")
EVIL = "<script>alert(1)</script> [bold]not markup[/bold]"
KEY = "sk-proj-" + "aB3" * 12
ESCAPE = "\x1b[31m"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows with a few faults; none of them refuses a run."""
    words = "apple river stone cloud light music paper green window garden".split()  # noqa: SIM905
    texts = [" ".join(words[(i * 7 + j * j) % 10] for j in range(12)) + f" {i}" for i in range(120)]
    lines = [{"prompt": f"{text}?", "completion": f" {i} {EVIL}{ESCAPE}"} for i, text in enumerate(texts)]
    lines += [lines[0], {"prompt": "key?", "completion": f" {KEY}"}, {"prompt": "empty?", "completion": " "}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def leaking(rows: Path, tmp_path: Path) -> tuple[str, ...]:
    """Settings whose held-out file repeats a training row."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(rows.read_text().splitlines()[3] + "\n" + '{"prompt": "another?", "completion": " yes"}\n')
    return (*SETTINGS, f"data.path={rows}", f"data.eval_path={held_out}", "data.eval_fraction=0")


def test_the_report_in_a_pipe_has_marks_and_no_colours(launch: Run, rows: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    settings = (*SETTINGS, f"data.path={rows}", "data.eval_fraction=0")
    done = launch("data", *settings, "--show", "2", "--html", str(page), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokenise: 123 of 123 documents" in done.stderr
    shown = done.stdout
    assert "\x1b" not in shown
    assert shown.count("⟦") == shown.count("⟧") > 2
    for trained in re.findall("(?<!between )⟦(.*?)⟧", shown, re.DOTALL):
        assert re.fullmatch(rf" (\d+ {re.escape(EVIL)}␛\[31m|\[API key: .*\])<\|im_end\|>", trained), trained
    assert re.search(r"^train +123 +1 +122 ", shown, re.MULTILINE)
    assert re.search(r"document 2 of \d+, train, \d+ tokens", shown)
    assert f"{rows}:121: the same as {rows}:1" in shown
    assert f"{rows}:122: completion, character 1: [API key: s…, 44 characters]" in shown
    assert "data.checks.empty_answer=drop" in shown
    assert KEY not in shown + done.stderr + page.read_text()
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.count("<svg") >= 4


def test_the_report_for_programs(launch: Run, rows: Path, tmp_path: Path) -> None:
    done = launch("data", *SETTINGS, f"data.path={rows}", "data.eval_fraction=0", "--json", "--show=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["documents"] == 122
    assert not report["refused"]
    assert {one["name"]: one["count"] for one in report["findings"]}["secrets"] == 1
    assert [one["whole"] for one in report["shown"]] == [True]


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_colours_unless_they_are_not_wanted(
    launcher_env: Mapping[str, str], rows: Path, tmp_path: Path, no_color: bool
) -> None:
    environment = {**launcher_env, "TERM": "xterm-256color", "COLUMNS": "120", **({"NO_COLOR": "1"} if no_color else {})}
    command = [sys.executable, "-m", "launcher", "data", *SETTINGS, f"data.path={rows}", "data.eval_fraction=0"]
    parent, child = pty.openpty()
    try:
        process = subprocess.Popen(command, stdout=child, stderr=subprocess.PIPE, env=environment, cwd=tmp_path)
        os.close(child)
        written = bytearray()
        while True:
            try:
                piece = os.read(parent, 1 << 16)
            except OSError:
                break
            if not piece:
                break
            written += piece
        assert process.wait(timeout=120) == 0
    finally:
        os.close(parent)
    shown = written.decode()
    assert ("⟦" in shown) is no_color
    assert ("\x1b[1;32m" in shown) is not no_color
    assert ESCAPE not in shown, "the text of a row gives no orders to the terminal"


def test_held_out_rows_in_training_refuse_report_and_run(launch: Run, leaking: tuple[str, ...], tmp_path: Path) -> None:
    runs = f"run.root={tmp_path / 'runs'}"
    reported = launch("data", *leaking, cwd=tmp_path)
    assert reported.returncode == 2
    assert "1 of 2 (50.0%)  held-out documents" in reported.stdout
    for done in (reported, launch(*leaking, runs, "run.name=x", "train.max_steps=1", cwd=tmp_path)):
        assert done.returncode == 2, done.stdout
        assert "held_out.jsonl:1" in done.stderr
        assert "data.checks.held_out_in_train=keep" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists(), "refused before anything is submitted"
    planned = launch("plan", *leaking, cwd=tmp_path)
    assert planned.returncode == 0
    assert "a run is refused for that" in planned.stdout
    for setting in ("held_out_in_train=keep", "max_held_out_in_train=0.5", "held_out_in_train=drop"):
        assert launch("data", *leaking, f"data.checks.{setting}", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--html"], "--html needs a value"),
        (["--show", "many"], "--show is a number"),
        (["--show", "--json"], "--show needs a value"),
        (["--html", "nowhere/page.html"], "cannot be written"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(launch: Run, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = launch("data", *SETTINGS, "data.path=rows.jsonl", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "remedy: " in done.stderr
