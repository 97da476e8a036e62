"""Text and tables in terminals of any width, and in pipes."""

from __future__ import annotations

from typing import Any

import pytest
from rich.cells import cell_len

from launcher.cli import formatting, why
from launcher.cli.views import data_view

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


def source(name: str) -> dict[str, Any]:
    counts = dict.fromkeys(("read_documents", "dropped_documents", "documents", "truncated_documents", "rows"), 123_456)
    fractions = dict.fromkeys(("trained_frac", "fill_frac", "padding_frac", "frac"), 0.5)
    lengths = {"document_tokens": {"median": 100, "max": 2000}, "tokens": 123_456_789, "split_documents": 0, "epochs": 1.0}
    bins = {"length_histogram": [{"max_tokens": 128, "documents": 123_456}]}
    return {"name": name, **counts, **fractions, **lengths, **bins, "documents_with_turn_end": 123_456}


@pytest.mark.parametrize("num_sources", [1, 5])
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_tables_of_data_fit_into_the_terminal(
    columns: int, num_sources: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    sources = [source(f"source-number-{i}") for i in range(num_sources)]
    report = {**source("all"), "sources": sources, "held_out": {"read_documents": 0}}
    console = data_view.Console(width=columns)
    data_view._print_sources(console, report)
    data_view._print_lengths(console, report)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= columns
    text = "\n".join(lines)
    assert "…" not in text, "no cell is cut"
    assert text.count("123,456,789") == num_sources + (num_sources > 1), "of each source and of the mixture"


def test_the_documents_of_a_step_fit_into_the_terminal_with_the_begin_of_their_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"step": 1200, "train/loss": 10.8, "train/grad_norm": 0.5, "train/lr": 1e-5}
    document = {"document": 7, "where": "/shared/data/answers.jsonl:71640", "source": "questions", "trained_tokens": 1237}
    document |= {"loss": 10.8, "max_token_loss": 11.0, "answer": "In the first route, he spends six minutes " * 3}
    event = {"time": 0.0, "step": 1199, "text": "the loss is not finite on rank 3, and " * 4}
    rows, scored = [{"row": 10680, "documents": [document]}], {"scored_at": 1100, "not_scored": ""}
    monkeypatch.setenv("COLUMNS", "80")
    lines = why._lines({"run": "mine", "step": 1200, "steps": [step], "rows": rows, "events": [event], **scored})
    assert max(map(len, lines)) <= 80
    index = lines.index(document["where"])
    assert lines[index + 1] == "  questions  10680    1,237  10.80        11.00  In the first route, he spe..."


def test_a_cell_with_line_breaks_is_no_row_of_its_own() -> None:
    """Run folders and mirrors may contain other users' runs, and those users choose the names and states."""
    lines = formatting.table(("run", "state"), [("theirs\ndemo  failed", "running\nmine"), ("demo", "completed")])
    assert lines == ["run                   state", "theirs\\ndemo  failed  running\\nmine", "demo                  completed"]
