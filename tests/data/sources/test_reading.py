from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config.sections.data import STDLIB_DOCS, DataSection, Source
from launcher.data.sources.documents import Chat, Completion, Message, PlainText
from launcher.data.sources.reading import check_sources, count_rows, read_documents
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
def test_each_format_is_read_and_recognized(tmp_path: Path, format: str, named: bool) -> None:
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


@pytest.mark.parametrize(("text", "count"), [("a\nb\n", 2), ("a\nb", 2), ("a\n", 1), ("a", 1)])
def test_the_lines_of_a_file_are_counted_exactly(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "rows.txt"
    path.write_text(text)
    assert count_rows(Source(path=str(path))) == count


@pytest.mark.parametrize(
    ("line", "format", "column", "words"),
    [
        ('{"text": "a"', "auto", 13, "not JSON"),
        ('"hunter2"', "auto", None, "the line holds a string, not an object"),
        ('{"body": "a"}', "auto", None, "no known format (found: body)"),
        ('{"text": "a"}', "messages", None, "lacks the key messages (found: text)"),
        ('{"text": null}', "text", None, "text is null, not text"),
        ('{"text": "\\ud83d"}', "text", None, "surrogate"),
    ],
)
def test_an_unusable_row_is_reported_with_its_place(
    tmp_path: Path, line: str, format: str, column: int | None, words: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(DataError) as caught:
        read(path, format)
    problem = caught.value.problems[0]
    assert problem.where == f"{path}:2" + (f":{column}" if column else "")
    assert words in problem.message
    assert problem.remedy


@pytest.mark.parametrize("text", ['[{"text": "a"}]', '[\n{"text": "a"}\n]\n'])
def test_one_json_array_is_read_from_a_file_of_either_name(tmp_path: Path, text: str) -> None:
    for name in ("a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz"):
        array = tmp_path / name
        array.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        assert read(array) == [PlainText(f"{array}:row 1", "a")]
        assert count_rows(Source(path=str(array))) >= 1


def test_a_source_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        read(path)


def test_columns_name_the_rows_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "1+1?", "answer": "2", "text": "hidden", "prompt": "hidden"}))
    as_chat = Source(path=str(path), columns={"instruction": "question", "output": "answer"}, format="alpaca")
    (document,) = (document for document, _ in read_documents(as_chat))
    assert document == Chat(f"{path}:1", (Message("user", "1+1?"), Message("assistant", "2")))
    raw = Source(path=str(path), columns={"prompt": "question", "completion": "answer"}, format="prompt_completion")
    assert [document for document, _ in read_documents(raw)] == [Completion(f"{path}:1", "1+1?", "2")]
    with pytest.raises(DataError, match=r"lacks the key answr, which columns\.output names"):
        list(read_documents(as_chat.model_copy(update={"columns": {"output": "answr"}})))


def test_a_mapping_to_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="has no column promt"):
        Source(path="a.jsonl", columns={"promt": "question"})


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
