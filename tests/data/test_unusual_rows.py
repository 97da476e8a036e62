"""Rows, files and texts of unusual size or content."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from special_files import link_to_device, make_pipe
from transformers import AutoTokenizer

from launcher.config.sections.data import DataSection, Source
from launcher.data.checks import patterns
from launcher.data.sources import Chat, Message, check_sources, files, json_array, read_documents
from launcher.data.tokenization.chat_template import ChatTemplate
from launcher.data.tokenization.loss_mask import LossMask
from launcher.errors import DataError, Problem


def refusal(source: Source) -> Problem:
    with pytest.raises(DataError) as error:
        list(read_documents(source))
    (problem,) = error.value.problems
    return problem


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_row_of_many_keys_is_not_shown_whole(tmp_path: Path, kind: str) -> None:
    keys = [f"key{i}" for i in range(10_000)]
    content = json.dumps(dict.fromkeys(keys, 1)) if kind == "jsonl" else f"{','.join(keys)}\n1,2\n"
    (tmp_path / f"rows.{kind}").write_text(content)
    problem = refusal(Source(path=str(tmp_path / f"rows.{kind}")))
    assert "and 9,970 more" in problem.message
    assert len(problem.message) < 1000


def test_a_time_that_python_cannot_represent_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a"], "at": pyarrow.array([2**62], pyarrow.timestamp("us"))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert refusal(Source(path=str(tmp_path / "rows.parquet"))).message == "the parquet file is corrupt: date value out of range"


def dictionary_table(values: list[str], indices: list[int]) -> pyarrow.Array:
    """Return a column whose rows refer to a few values, each stored once in a parquet file."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(indices, pyarrow.int32()), pyarrow.array(values))


def write_table(file: Path, column: pyarrow.Array, has_schema: bool = False) -> None:
    table = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(table, file, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=has_schema)


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1 << 20)
    for name in ("rows.jsonl", "rows.csv"):
        with open(tmp_path / name, "wb") as file:
            file.write(b'{"text": "one"}\n' if name == "rows.jsonl" else b"text\n")
            file.truncate(1 << 30)
        problem = refusal(Source(path=str(tmp_path / name)))
        assert (problem.message, problem.where) == ("the line is longer than 1 MiB", f"{tmp_path / name}:2")


def test_many_rows_may_have_more_bytes_than_one_row_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, json_array):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 20)
    text = "two\nlines " * 10_000
    (tmp_path / "rows.csv").write_text("text\n" + f'"{text}"\n' * 20)
    (tmp_path / "rows.json").write_text(json.dumps([{"text": text}] * 20))
    for name in ("rows.csv", "rows.json"):
        rows = [row for block in files.read_blocks(tmp_path / name, name) for row, _ in files.parse_block(block)]
        assert rows == [{"text": text}] * 20


@pytest.mark.timeout(300)
@pytest.mark.parametrize("make", [make_pipe, link_to_device])
def test_a_pipe_or_a_device_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "README.md"):
        make(tmp_path / "data" / name)
    for path in ("data", "data/train.jsonl", "data/*.jsonl"):
        (problem,) = check_sources(DataSection(sources=(Source(path=f"{tmp_path}/{path}"),)))
        assert problem.value == f"{tmp_path}/{path}"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.timeout(300)
def test_white_space_without_end_is_searched_once() -> None:
    """The search for keys and addresses happens before a text is shortened for display."""
    started = time.process_time()
    (shown,) = patterns.redact([f"write to me@a.org{' ' * 2_000_000}<|end|>{' ' * 2_000_000}."])
    assert shown.startswith("write to [e-mail address: m")
    assert time.process_time() - started < 20


@pytest.mark.timeout(300)
def test_a_long_reasoning_that_later_turns_leave_out_is_searched_once(tokenizer_dir: Path) -> None:
    text = (Path(__file__).parent / "templates/qwen3.jinja").read_text()
    template = ChatTemplate(AutoTokenizer.from_pretrained(str(tokenizer_dir)), text)
    thought = Message("assistant", "Yes.", reasoning_content="hm " * 1_000_000)
    chat = Chat("rows.jsonl:1", (Message("user", "Hi"), thought, Message("user", "Sure?"), Message("assistant", "Yes!")))
    started = time.process_time()
    full, spans = LossMask(template, ("<|im_end|>",), ()).find_spans(chat, "assistant")
    assert [full[span.start : span.end] for span in spans] == ["Yes.<|im_end|>", "<think>\n\n</think>\n\nYes!<|im_end|>"]
    assert time.process_time() - started < 20


def test_a_name_of_a_column_that_is_no_text_is_a_corrupt_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"texttexttext": ["a"]}), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"texttexttext", b"\x86exttexttext"))
    assert "parquet file" in refusal(Source(path=str(file))).message
