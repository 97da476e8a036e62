"""Text and tables in terminals of any width, and in pipes."""

from __future__ import annotations

import pytest

from launcher.cli import formatting

LONG_PATH = "/scratch/" + "a" * 80
TABLE = (("run", "state", ">step"), [("a-run-with-a-long-name", "completed", "10/10"), ("b", "failed", "3/10")])


def test_lines_are_wrapped_between_words_and_continued_under_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert formatting.wrap(["state      failed: rank 1 was killed because of memory"], 11) == [
        "state      failed: rank 1 was killed",
        "           because of memory",
    ]
    assert formatting.wrap([f"  {LONG_PATH}: damaged", ""], 6) == [f"  {LONG_PATH}:", "      damaged", ""], "a path stays whole"


def test_lines_in_a_pipe_stay_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert formatting.terminal_columns() is None
    assert formatting.wrap(["word " * 100], 11) == ["word " * 100]
    assert formatting.table(*TABLE)[1] == "a-run-with-a-long-name  completed  10/10"


def test_the_first_column_of_a_wide_table_has_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert formatting.table(*TABLE) == [
        "run",
        "  state       step",
        "a-run-with-a-long-name",
        "  completed  10/10",
        "b",
        "  failed      3/10",
    ]
    # In an even narrower terminal, each cell gets its own line.
    monkeypatch.setenv("COLUMNS", "15")
    assert formatting.table(*TABLE)[:4] == ["run", "       a-run-with-a-long-name", "state  completed", "step   10/10"]


def test_a_cell_with_line_breaks_is_no_row_of_its_own() -> None:
    """Run folders and mirrors may contain other users' runs, and those users choose the names and states."""
    lines = formatting.table(("run", "state"), [("theirs\ndemo  failed", "running\nmine"), ("demo", "completed")])
    assert lines == ["run                   state", "theirs\\ndemo  failed  running\\nmine", "demo                  completed"]
