"""Text and tables in terminals of any width, and in pipes; text from a run's files is made safe before it is printed."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
from forked import Launch

from launcher.cli.render import terminal
from launcher.cli.render.sections import Commands, Items, MarkedText, Rows, Section, Table, Text
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.security.redaction import printable_output
from launcher.tracking.jsonl import JsonlTracker

LONG_PATH = "/scratch/" + "a" * 80
TABLE = Table(("run", "state", "step"), [("a-run-with-a-long-name", "completed", "10/10"), ("b", "failed", "3/10")], numbers=(2,))
EVIL = "\x1b]0;title\x07\x1b[2Ja\x9b1mb\u202ec"


def test_lines_are_wrapped_between_words_and_continued_under_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert terminal.to_lines(Rows([("state", "failed: rank 1 was killed because of memory")]), label_columns=11) == [
        "state      failed: rank 1 was killed",
        "           because of memory",
    ]
    assert terminal.to_lines(Items([f"{LONG_PATH}: damaged", ""])) == [f"{LONG_PATH}:", "    damaged", ""], "a path stays whole"


def test_lines_in_a_pipe_stay_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal.columns() is None
    assert terminal.to_lines(Text("word " * 100)) == ["word " * 100]
    assert terminal.to_lines(TABLE)[1] == "a-run-with-a-long-name  completed  10/10"


def test_the_first_column_of_a_wide_table_has_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert terminal.to_lines(TABLE) == [
        "run",
        "  state       step",
        "a-run-with-a-long-name",
        "  completed  10/10",
        "b",
        "  failed      3/10",
    ]
    # In an even narrower terminal, each cell gets its own line.
    monkeypatch.setenv("COLUMNS", "15")
    assert terminal.to_lines(TABLE)[:4] == ["run", "       a-run-with-a-long-name", "state  completed", "step   10/10"]


def test_a_cell_with_line_breaks_is_no_row_of_its_own() -> None:
    """Run folders and mirrors may contain other users' runs, and those users choose the names and states."""
    lines = terminal.to_lines(Table(("run", "state"), [("theirs\ndemo  failed", "running\nmine"), ("demo", "completed")]))
    assert lines == ["run                   state", "theirs\\ndemo  failed  running\\nmine", "demo                  completed"]


def test_sections_are_separated_and_what_is_under_a_title_is_indented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    inner = Section("", [Table(("a", "b"), [("1", "2")], numbers=(1,)), Text("total")])
    assert terminal.to_lines(Text("first"), Section("next:", [Commands(["one", "two"])]), Section("set: better", [inner])) == [
        *("first", "", "next:", "  one", "  two", "", "set: better", "", "  a  b", "  1  2", "  total"),
    ]


def test_texts_cannot_control_the_terminal() -> None:
    lines = terminal.to_lines(Rows([("alert", "x\x1b[2J\ny")]), Text("\x1b[1m"), MarkedText([("no ", False), ("\x07yes", True)]))
    assert lines == ["alert       x\\x1b[2J", "            y", "\\x1b[1m", "no ⟦\\x07yes⟧"]


def test_nothing_that_a_run_holds_can_act_upon_the_terminal(launch_here: Launch, run: RunDir) -> None:
    JsonlTracker(run, 2).event("alert", f"an alert {EVIL}", step=10)
    run_store.update_status(run, state="failed", message=f"a message {EVIL}", job={"id": EVIL, "nodes": [EVIL]})
    log = run.rank_log(2, 0)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"10%\r20%\r\n\x1b[1;31mred\x1b[0m {EVIL}\n")
    evil = run.root.with_name(f"n{EVIL}")
    run.root.rename(evil)
    shown = ""
    for words in (
        ("ls", "--root", str(run.root.parent)),
        *(("status", str(evil)), ("logs", str(evil)), ("checkpoints", str(evil)), ("report", str(evil)), ("resume", str(evil))),
        ("status", f"{evil}-gone"),
    ):
        done = launch_here(*words)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", done.stdout + done.stderr), words
        shown += done.stdout
    for text in ("n", "an alert ", "a message "):
        assert f"{text}\\x1b]0;title\\x07\\x1b[2Ja\\x9b1mb\\u202ec" in shown
    assert "10%\n20%\nred \\x1b]0;" in shown


def test_what_libraries_log_cannot_act_upon_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers logs names from a model's config.json; its log handler keeps the stream from import time."""
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    logger = logging.getLogger("library")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    with printable_output():
        logger.warning("no rope of the type %s", EVIL)
    logger.warning("end")
    assert terminal.getvalue() == "no rope of the type \\x1b]0;title\\x07\\x1b[2Ja\\x9b1mb\\u202ec\nend\n"
    logger.removeHandler(handler)
