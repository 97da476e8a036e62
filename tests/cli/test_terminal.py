"""Text and tables in terminals of any width, and in pipes."""

from __future__ import annotations

import pytest

from launcher.cli.render import terminal
from launcher.cli.render.sections import Commands, Items, MarkedText, Rows, Section, Table, Text

LONG_PATH = "/scratch/" + "a" * 80
TABLE = Table(("run", "state", "step"), [("a-run-with-a-long-name", "completed", "10/10"), ("b", "failed", "3/10")], numbers=(2,))


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
