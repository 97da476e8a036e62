from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.config.sections.data import STDLIB_DOCS, DataSection, Source
from launcher.data.sources import (
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
        ('  {"text": nope}', "auto", 12, "not JSON"),
        ('["text"]\n["text"]', "auto", None, "holds a JSON array, not an object"),
        ('"hunter2"', "auto", None, "the line holds a string, not an object"),
        ('{"body": "a"}', "auto", None, "no known format (found: body)"),
        ('{"text": "a", "prompt": "b", "completion": "c"}', "auto", None, "prompt_completion and text"),
        ('{"text": "a"}', "messages", None, "lacks the key messages (found: text)"),
        ('{"prompt": "a"}', "prompt_completion", None, "lacks the key completion"),
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


@pytest.mark.parametrize(
    ("row", "format", "own_format"),
    [
        ('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}', "messages", "sharegpt"),
        ('{"instruction": "a", "output": "b"}', "messages", "alpaca"),
        ('{"text": "a"}', "alpaca", "text"),
    ],
)
def test_the_remedy_for_a_row_of_another_format_is_a_source_of_its_own(
    tmp_path: Path, row: str, format: str, own_format: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{row}\n")
    with pytest.raises(DataError, match="lacks the key") as caught:
        read(path, format)
    remedy = caught.value.problems[0].remedy
    assert f"has the format {own_format}, and its source has the format {format}" in remedy
    assert f"[{{name: train, path: {path}}}, {{name: {own_format}, path: FILE}}]" in remedy


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


def test_invalid_utf8_is_reported_with_its_place(tmp_path: Path) -> None:
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
    problems = check_sources(DataSection(sources=sources, eval_path="nowhere.jsonl", chat_template="nowhere.jinja"))
    assert [(problem.where, problem.value) for problem in problems] == [
        *((f"data.sources[{i}].path", paths[i]) for i in range(1, 5)),
        ("data.eval_path", "nowhere.jsonl"),
        ("data.chat_template", "nowhere.jinja"),
    ]
    words = ["not exist", "empty", "empty", "built-in", "not exist", "no such template"]
    for problem, word in zip(problems, words, strict=True):
        assert word in problem.message
        assert problem.remedy


@pytest.mark.parametrize("written", ["My.jsonl", "mine.jsonl", "My.JSONL"])
def test_a_missing_file_names_its_neighbors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my.jsonl", "other.csv", "sub/chats.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text('{"text": "a"}\n')
    (problem,) = check_sources(DataSection(sources=(Source(path=written),)))
    assert problem.remedy.startswith("did you mean my.jsonl? set data.sources[0].path to a data file")
    (problem,) = check_sources(DataSection(sources=(Source(path="Sub/chats.jsonl"),)))
    assert problem.remedy.startswith("did you mean sub? ")
    Path("nothing.yaml").write_text("model: tiny")
    for unlike in ("nothing_like_it.jsonl", "nothing.json"):
        (problem,) = check_sources(DataSection(sources=(Source(path=unlike),)))
        assert problem.remedy.startswith("set data.sources[0].path")
    (problem,) = check_sources(DataSection(sources=(Source(path="my.jsonl,sub/chats.jsonl"),)))
    assert problem.message == "commas do not separate data files"
    assert "'data.sources=[{name: my, path: my.jsonl}, {name: chats, path: sub/chats.jsonl}]'" in problem.remedy


def test_good_paths_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    assert check_sources(DataSection(sources=(Source(path=str(path)),), eval_path=str(path))) == []


def test_a_folder_within_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "rows" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "rows" / "a.jsonl").write_text('{"text": "a"}\n')
    list_folder = Path.iterdir

    def refuse_inner(folder: Path) -> Iterator[Path]:
        if folder == inner:
            raise PermissionError(13, "Permission denied", str(folder))
        return list_folder(folder)

    monkeypatch.setattr(Path, "iterdir", refuse_inner)
    (problem,) = check_sources(DataSection(sources=(Source(path=str(tmp_path / "rows")),)))
    assert problem.message == f"the folder {inner} cannot be read: Permission denied"
