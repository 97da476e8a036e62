"""Every row and file format is read and recognized, in blocks that workers parse; broken files are reported; built-in data."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.sections.data import STDLIB_DOCS, DataSection, Source
from launcher.data.sources.builtin import MAX_WORDS, NUM_PAIRS, list_pairs
from launcher.data.sources.documents import Document, Message
from launcher.data.sources.files import BLOCK_ROWS, Block, parse_block, read_array, read_blocks
from launcher.data.sources.reading import check_sources, compute_source_digest, count_rows, read_documents
from launcher.errors import DataError, Problem

# Blocks of rows that workers parse, and JSON arrays of any size


BIG = "x" * (1 << 19)
ANY_ROWS = st.lists(
    st.dictionaries(
        st.text(max_size=4), st.one_of(st.text(max_size=20), st.integers(), st.booleans(), st.lists(st.text())), max_size=3
    )
)
ROWS = [{"prompt": f'Q{i}: é, "{i}"\nnext', "completion": f"A{i}"} for i in range(5)]


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=2).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


KINDS: dict[str, tuple[Callable[[list[dict[str, Any]]], bytes], str]] = {
    "jsonl": (as_jsonl, "{path}:{line}"),
    "json": (as_json, "{path}:row {line}"),
    "csv": (as_csv, "{path}:{csv_line}"),
    "parquet": (as_parquet, "{path}:row {line}"),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def read(path: Path, **settings: Any) -> list[Any]:
    return [document for document, _ in read_documents(Source(path=str(path), **settings))]


def problem_of(path: Path, **settings: Any) -> Problem:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    (problem,) = caught.value.problems
    assert problem.remedy
    return problem


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, packer: str) -> None:
    write, place = KINDS[kind]
    path = tmp_path / f"rows.{kind}{packer}"
    path.write_bytes(PACKERS[packer](write(ROWS)))
    # Each prompt spans two lines of a CSV file.
    places = [place.format(path=path, line=i + 1, csv_line=2 + 2 * i) for i in range(len(ROWS))]
    assert read(path) == [
        Document(where, prompt=row["prompt"], text=row["completion"]) for where, row in zip(places, ROWS, strict=True)
    ]
    assert count_rows(Source(path=str(path))) >= len(ROWS)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_compression_is_detected_by_content_not_by_name(tmp_path: Path, kind: str, packer: str) -> None:
    unnamed, misnamed = tmp_path / "rows", tmp_path / f"rows.{kind}"
    for path in (unnamed, misnamed):
        path.write_bytes(PACKERS[packer](KINDS[kind][0](ROWS)))
        assert [document.text for document in read(path)] == [row["completion"] for row in ROWS]


def test_each_line_of_a_text_file_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone é\r\n\n  two\n".encode())
    assert [(document.where, document.text) for document in read(path)] == [(f"{path}:1", "one é"), (f"{path}:3", "  two")]


def test_lists_and_objects_in_tables(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "weight": 0},
        {"role": "user", "content": "[not JSON]"},
        {"role": "assistant", "content": "[3]", "name": "x"},
    ]
    expected = (
        Message("user", "1+1?"),
        Message("assistant", "2", weight=0),
        Message("user", "[not JSON]"),
        Message("assistant", "[3]", name="x"),
    )
    table, text = tmp_path / "a.parquet", tmp_path / "a.csv"
    # In a parquet file every message has every key, with null for absent ones.
    table.write_bytes(as_parquet([{"messages": messages}]))
    text.write_bytes(as_csv([{"messages": json.dumps(messages)}]))
    assert read(table) == [Document(f"{table}:row 1", expected)]
    assert read(text) == [Document(f"{text}:2", expected)]


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstd)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_or_corrupt_compressed_file_is_reported(
    tmp_path: Path, kind: str, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"rows.{kind}.{ending}"
    whole = pack(KINDS[kind][0]([{**row, "n": str(i**5 * 7919)} for i, row in enumerate(ROWS * 500)]))
    corrupt = bytearray(whole)
    corrupt[len(whole) // 2] ^= 0xFF
    # A zstd stream has no checksum.
    for content in (whole[: int(len(whole) * 0.99)], *([corrupt] if ending == "gz" else [])):
        path.write_bytes(content)
        assert problem_of(path).where == str(path)


def test_invalid_utf8_is_reported_in_every_kind_of_text_file(tmp_path: Path) -> None:
    lines = {
        "jsonl": b'{"text": "ok"}\n{"text": "\xff"}\n',
        "json": b'[{"text":\n "\xff"}]',
        "csv": b"text\n\xff\n",
        "txt": b"a\n\xff",
    }
    for kind, content in lines.items():
        for packer, pack in PACKERS.items():
            path = tmp_path / f"rows.{kind}{packer}"
            path.write_bytes(pack(content))
            problem = problem_of(path)
            assert "not UTF-8 text (byte 0xff)" in problem.message
            assert problem.where.startswith(f"{path}:2")


@pytest.mark.parametrize(
    ("name", "content", "where", "words"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"', ":1:29", "not JSON"),
        ("a.json", b'[{"text": "a"}, 3]', ":row 2", "not an object"),
        ("a.csv", b'text,other\n"a,b\n', ":2", "cannot be read"),
        ("a.csv", b"text,other\na,b\nc\n", ":3", "has 1 cells, and the first line names 2 columns"),
        ("a.csv", b"text,text\na,b\n", ":1", "names a column twice"),
        ("a.parquet", b"PAR1 and no more", "", "not a complete parquet file"),
        ("a.jsonl", b"[" * 100_000, ":row 1", "recursion"),
        ("a.json", b'[{"text": ' + b"1" * 5000 + b"}]", ":row 1", "digits"),
        ("a.dat", b"what is this", "", "neither the name nor the content"),
        ("a.jsonl", b"", "", "holds no rows"),
        ("a.csv", b"text\n", "", "holds no rows"),
    ],
)
def test_an_error_in_a_file_has_its_place(tmp_path: Path, name: str, content: bytes, where: str, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    problem = problem_of(path)
    assert words in problem.message
    assert problem.where == f"{path}{where}"


def test_a_corrupt_page_of_a_parquet_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    content = bytearray(as_parquet([{"text": f"{i**9}"} for i in range(2000)]))
    content[200:240] = b"\xff" * 40
    path.write_bytes(content)
    problem = problem_of(path)
    assert "the parquet file is corrupt" in problem.message
    assert problem.where.startswith(f"{path}, after row ")
    content[-60:-20] = b"\xff" * 40
    path.write_bytes(content)
    assert "not a complete parquet file" in problem_of(path).message


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # This file can be opened, but reading it fails.
    path.symlink_to("/proc/self/mem")
    source = Source(path=str(path))
    for action in (compute_source_digest, count_rows, lambda source: list(read_documents(source))):
        with pytest.raises(DataError, match="the data file cannot be read: Input/output error") as caught:
            action(source)
        assert caught.value.problems[0].where == str(path)


def test_a_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in problem_of(path).remedy


def test_a_table_that_is_named_jsonl_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        path = tmp_path / name
        path.write_bytes(as_csv([{"prompt": "a", "completion": "b"}] * 3))
        problem = problem_of(path)
        assert (problem.where, "CSV" in problem.message, ".csv" in problem.remedy) == (str(path), True, True)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            path.write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
        case ".txt":
            path.write_text("".join(f"{row['text']}\n" for row in rows))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt", "parquet"])
def test_blocks_are_bounded_and_hold_every_row_once_in_order(tmp_path: Path, kind: str) -> None:
    short = [{"text": f"row {i}"} for i in range(2 * BLOCK_ROWS + 1)]
    made = list(read_blocks(write_rows(tmp_path / f"short.{kind}", short), f"short.{kind}"))
    assert [len(list(parse_block(block))) for block in made] == [BLOCK_ROWS, BLOCK_ROWS, 1]
    elsewhere: list[Block] = [pickle.loads(pickle.dumps(block)) for block in made]
    found = [found for block in elsewhere for found in parse_block(block)]
    assert [row for row, _ in found] == short
    first = {"csv": 2}.get(kind, 1)
    said = f"short.{kind}:row " if kind in ("json", "parquet") else f"short.{kind}:"
    assert [place for _, place in found] == [f"{said}{first + i}" for i in range(len(short))]
    long = [{"text": f"{i}{BIG}"} for i in range(5)]
    made = list(read_blocks(write_rows(tmp_path / f"long.{kind}", long), f"long.{kind}"))
    assert kind == "parquet" or len(made) >= 3
    assert [row for block in made for row, _ in parse_block(block)] == long


def parsed(content: bytes) -> list[Any]:
    return [row for row, _, _ in read_array(io.BufferedReader(io.BytesIO(content)), "a.json")]


@pytest.mark.rest
@given(rows=ANY_ROWS, indent=st.sampled_from([None, 2]), is_ascii=st.booleans())
def test_a_json_array_is_read_entry_by_entry(rows: list[dict[str, Any]], indent: int | None, is_ascii: bool) -> None:
    content = json.dumps(rows, indent=indent, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    assert parsed(b" " + content + b"\n") == rows
    # A truncated file is always reported.
    if len(content) > 2:
        with pytest.raises(DataError):
            parsed(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('[{"a": 1},\n {"b" 2}]', "2:7"),
        ('[{"a": 1}\n {"b": 2}]', "1:10"),
        ('[{"a": 1},\n\n]', "3:1"),
        ('[{"a": 1}]\n[]', "2:1"),
        ('[{"a": 1},\n', "2:1"),
        ('[{"a": 1}\n', "1:10"),
        ('[{"a": 1}[]', "1:10"),
        ('[{"a": "no end}]', "1:8"),
        ('[{"é": "ü",\n "é": tru }]', "2:7"),
        ("[\n", "2:1"),
    ],
)
def test_an_error_in_a_json_array_has_line_and_column(content: str, where: str) -> None:
    with pytest.raises(DataError) as caught:
        parsed(content.encode())
    assert caught.value.problems[0].where == f"a.json:{where}"


ROW_OF = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a\nb"},
}


def read_as(path: Path, format: Any = "auto") -> list[Any]:
    return [document for document, _ in read_documents(Source(path=str(path), format=format))]


@pytest.mark.parametrize("format", list(ROW_OF))
@pytest.mark.parametrize("named", [True, False])
def test_each_format_is_read_and_recognized(tmp_path: Path, format: str, named: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(ROW_OF[format], ensure_ascii=False) + "\n\n" + json.dumps(ROW_OF[format]))
    where = f"{path}:2"
    expected = {
        "messages": Document(where, (Message("user", "a"), Message("assistant", "é"))),
        "prompt_completion": Document(where, prompt="a", text="b"),
        "text": Document(where, text="a\nb"),
    }
    documents = read_as(path, format if named else "auto")
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
        read_as(path, format)
    problem = caught.value.problems[0]
    assert problem.where == f"{path}:2" + (f":{column}" if column else "")
    assert words in problem.message
    assert problem.remedy


@pytest.mark.parametrize("text", ['[{"text": "a"}]', '[\n{"text": "a"}\n]\n'])
def test_one_json_array_is_read_from_a_file_of_either_name(tmp_path: Path, text: str) -> None:
    for name in ("a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz"):
        array = tmp_path / name
        array.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        assert read_as(array) == [Document(f"{array}:row 1", text="a")]
        assert count_rows(Source(path=str(array))) >= 1


def test_a_source_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_as(path)


def test_columns_name_the_rows_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "1+1?", "answer": "2", "text": "hidden", "prompt": "hidden"}))
    as_chat = Source(path=str(path), columns={"instruction": "question", "output": "answer"}, format="alpaca")
    (document,) = (document for document, _ in read_documents(as_chat))
    assert document == Document(f"{path}:1", (Message("user", "1+1?"), Message("assistant", "2")))
    raw = Source(path=str(path), columns={"prompt": "question", "completion": "answer"}, format="prompt_completion")
    assert [document for document, _ in read_documents(raw)] == [Document(f"{path}:1", prompt="1+1?", text="2")]
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


def test_there_are_about_3000_pairs_of_sensible_length() -> None:
    assert 0.9 * NUM_PAIRS <= len(list_pairs()) <= NUM_PAIRS
    assert all(pair.symbol in pair.question for pair in list_pairs())
    assert all(3 <= len(pair.answer.split()) <= MAX_WORDS + 60 for pair in list_pairs())
    assert len({pair.question.replace(pair.symbol, "X") for pair in list_pairs()}) >= 12


def test_the_held_out_pairs_share_nothing_with_the_others() -> None:
    held_out = [pair for pair in list_pairs() if pair.held_out]
    rest = [pair for pair in list_pairs() if not pair.held_out]
    assert 0.03 <= len(held_out) / len(list_pairs()) <= 0.07
    assert not {pair.symbol for pair in held_out} & {pair.symbol for pair in rest}

    def docstrings(split: list) -> set[str]:
        return {pair.answer.split("\n\n", 1)[1] if pair.answer.startswith("`") else pair.answer for pair in split}

    assert not docstrings(held_out) & docstrings(rest)


@pytest.mark.rest
def test_stdlib_docs_import_nothing_and_are_the_same_in_every_process() -> None:
    code = (
        "import sys, hashlib; from launcher.data.sources.builtin import list_pairs;"
        "got = repr(list_pairs()).encode();"
        "odd = {'antigravity', 'this', 'tkinter', 'turtle', 'idlelib', 'smtplib', 'sqlite3'} & set(sys.modules);"
        "print(hashlib.sha256(got).hexdigest(), sorted(odd))"
    )
    command = [sys.executable, "-c", code]
    outputs = {
        subprocess.run(
            command,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().endswith("[]\n")
