from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.config.sections.data import Source
from launcher.data.sources.reading import read_documents
from launcher.errors import DataError, Problem, causes


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
