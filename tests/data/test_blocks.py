"""Files are split into blocks of rows that workers parse, and JSON arrays of any size are streamed."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.data.sources.files import BLOCK_ROWS, Block, parse_block, read_array, read_blocks
from launcher.errors import DataError

BIG = "x" * (1 << 19)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
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
    made = list(read_blocks(write(tmp_path / f"short.{kind}", short), f"short.{kind}"))
    assert [len(list(parse_block(block))) for block in made] == [BLOCK_ROWS, BLOCK_ROWS, 1]
    elsewhere: list[Block] = [pickle.loads(pickle.dumps(block)) for block in made]
    found = [found for block in elsewhere for found in parse_block(block)]
    assert [row for row, _ in found] == short
    first = {"csv": 2}.get(kind, 1)
    said = f"short.{kind}:row " if kind in ("json", "parquet") else f"short.{kind}:"
    assert [place for _, place in found] == [f"{said}{first + i}" for i in range(len(short))]
    long = [{"text": f"{i}{BIG}"} for i in range(5)]
    made = list(read_blocks(write(tmp_path / f"long.{kind}", long), f"long.{kind}"))
    assert kind == "parquet" or len(made) >= 3
    assert [row for block in made for row, _ in parse_block(block)] == long


ROWS = st.lists(
    st.dictionaries(
        st.text(max_size=4), st.one_of(st.text(max_size=20), st.integers(), st.booleans(), st.lists(st.text())), max_size=3
    )
)


def parsed(content: bytes) -> list[Any]:
    return [row for row, _, _ in read_array(io.BufferedReader(io.BytesIO(content)), "a.json")]


@pytest.mark.rest
@given(rows=ROWS, indent=st.sampled_from([None, 2]), is_ascii=st.booleans())
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
