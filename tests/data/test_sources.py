from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config.data import DataSection, Source
from launcher.data.sources import (
    STDLIB_DOCS,
    Chat,
    Completion,
    Message,
    PlainText,
    check_sources,
    count_rows,
    read_documents,
)
from launcher.errors import DataError

ROWS = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a\nb"},
}


def read(path: Path, format: Any = "auto") -> list[Any]:
    return [document for document, _ in read_documents(Source(path=str(path), format=format))]


@pytest.mark.parametrize("format", list(ROWS))
@pytest.mark.parametrize("named", [True, False])
def test_each_format_is_read_and_recognised(tmp_path: Path, format: str, named: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(ROWS[format], ensure_ascii=False) + "\n\n" + json.dumps(ROWS[format]))
    where = f"{path}:2"
    expected = {
        "messages": Chat(where, (Message("user", "a"), Message("assistant", "é"))),
        "prompt_completion": Completion(where, "a", "b"),
        "text": PlainText(where, "a\nb"),
    }
    documents = read(path, format if named else "auto")
    assert documents[0] == expected[format]
    assert [document.where for document in documents] == [where, f"{path}:4"]
    assert count_rows(Source(path=str(path))) >= 2


@pytest.mark.parametrize(
    ("line", "format", "column", "words"),
    [
        ('{"text": "a"', "auto", 13, "not JSON"),
        ('  {"text": nope}', "auto", 12, "not JSON"),
        ('["text"]', "auto", 1, "list, not an object"),
        ('{"body": "a"}', "auto", 1, "no known format (its keys are body)"),
        ('{"text": "a", "prompt": "b", "completion": "c"}', "auto", 1, "prompt_completion and text"),
        ('{"text": "a"}', "messages", 1, "lacks the key messages (found: text)"),
        ('{"prompt": "a"}', "prompt_completion", 1, "lacks the key completion"),
        ('{"text": null}', "text", 1, "text is a null, not text"),
        ('{"text": "\\ud83d"}', "text", 1, "surrogate"),
        ('{"messages": []}', "auto", 1, "messages is empty"),
        ('{"messages": ["hi"]}', "auto", 1, "messages[0] is a string"),
        ('{"messages": [{"role": "user"}]}', "auto", 1, "lacks the key messages[0].content"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "auto", 1, "messages[0].content is a list"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, line: str, format: str, column: int, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(DataError) as caught:
        read(path, format)
    problem = caught.value.problems[0]
    assert problem.where == f"{path}:2:{column}"
    assert words in problem.what
    assert problem.remedy


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "é'.encode() + b"\xff" + b'"}\n')
    with pytest.raises(DataError, match="not UTF-8") as caught:
        read(path)
    assert caught.value.problems[0].where == f"{path}:1:12"


def test_every_path_is_checked_at_once(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    paths = [STDLIB_DOCS, str(tmp_path / "missing"), str(tmp_path), str(empty), "builtin:poems"]
    sources = tuple(Source(name=f"s{i}", path=path) for i, path in enumerate(paths))
    problems = check_sources(DataSection(sources=sources, eval_path="nowhere.jsonl"))
    assert [(problem.where, problem.value) for problem in problems] == [
        *((f"data.sources[{i}].path", paths[i]) for i in range(1, 5)),
        ("data.eval_path", "nowhere.jsonl"),
    ]
    for problem, word in zip(problems, ["not exist", "not a file", "empty", "built-in", "not exist"], strict=True):
        assert word in problem.what
        assert problem.remedy


def test_good_paths_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    assert check_sources(DataSection(sources=(Source(path=str(path)),), eval_path=str(path))) == []
