"""Malicious datasets and templates that try to exhaust time or memory."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import signal
import time
import tracemalloc
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from special_files import link_to_device, make_pipe
from transformers import AutoTokenizer

from launcher.cli import worker_process
from launcher.config.sections.data import DataSection, Source
from launcher.data.checks import minhash, patterns
from launcher.data.checks.unicode_forms import to_nfkc
from launcher.data.sources import Chat, Message, check_sources, files, json_array, parquet, read_documents
from launcher.data.tokenization import parallel, render_limits
from launcher.data.tokenization.chat_template import ChatTemplate
from launcher.data.tokenization.loss_mask import LossMask
from launcher.errors import DataError, Problem
from launcher.evaluate import answer_text
from launcher.export.model_card import base_front_matter

CHAT = Chat("rows.jsonl:1", (Message("user", "Hi"), Message("assistant", "Hello.")))


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_limits, "MAX_CPU_S", 0.5)
    monkeypatch.setattr(render_limits, "MAX_BYTES", 1 << 30)


def refusal(source: Source) -> Problem:
    with pytest.raises(DataError) as error:
        list(read_documents(source))
    (problem,) = error.value.problems
    return problem


@pytest.mark.rest
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.5 s"),
        (
            # Jinja's `sequence` test swallows every Exception while it counts the rest of the loop.
            "{% for x in range(90000)|map('string')|map('center', 5000)|map('upper')|map('lower')|map('title') %}"
            "{% if loop is sequence %}{% endif %}{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
            "{% endfor %}",
            "takes more than 0.5 s",
        ),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "takes more than"),
        ("{{ 'a' * 10 ** 10 }}", "takes more than 1 GiB of memory"),
        ("{{ messages | join | center(10 ** 10) }}", "takes more than 1 GiB of memory"),
        ("{{ range(10 ** 9) }}", "refuses this conversation: Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses this conversation: maximum recursion depth exceeded"),
    ],
)
@pytest.mark.parametrize("marked", [False, True])
def test_an_endless_template_is_refused(tokenizer_dir: Path, template: str, message: str, marked: bool) -> None:
    text = template + "{% generation %}{% endgeneration %}" * marked
    chat_template = ChatTemplate(AutoTokenizer.from_pretrained(str(tokenizer_dir)), text)
    with pytest.raises(DataError) as error:
        chat_template.render_with_marks(CHAT, CHAT.messages) if marked else chat_template.render(CHAT)
    assert error.value.problems[0].message.startswith(f"the chat template {message}")
    # The limits apply to each conversation separately.
    until = time.process_time() + 0.7
    while time.process_time() < until:
        pass
    assert ChatTemplate(AutoTokenizer.from_pretrained(str(tokenizer_dir)), "{{ messages[0].content }}").render(CHAT) == "Hi"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("marked", [False, True])
def test_a_conversation_of_many_messages_has_no_more_time(tokenizer_dir: Path, marked: bool) -> None:
    """The template is rendered once per answer, so the time is quadratic in the number of messages."""
    answer = "{% generation %}{{ m.content }}{% endgeneration %}" if marked else "{{ m.content }}"
    text = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' %}{{ m.content }}{% else %}"
        + answer
        + "{% endif %}\n{% endfor %}"
    )
    text += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    mask = LossMask(ChatTemplate(AutoTokenizer.from_pretrained(str(tokenizer_dir)), text), [])
    turns = [Message(role, f"{role} {i}") for i in range(2000) for role in ("user", "assistant")]
    begun = time.process_time()
    with pytest.raises(DataError, match=r"the chat template takes more than 0\.5 s for one conversation"):
        mask.find_spans(Chat("rows.jsonl:1", tuple(turns)), "assistant")
    assert time.process_time() - begun < 5
    assert len(mask.find_spans(Chat("rows.jsonl:2", tuple(turns[:20])), "assistant")[1]) == 10


def test_a_row_of_too_many_messages_is_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}] * 10_001
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    problem = refusal(Source(path=str(tmp_path / "rows.jsonl")))
    assert problem.message == "messages has more than 10,000 messages"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_row_of_many_keys_is_not_shown_whole(tmp_path: Path, kind: str) -> None:
    keys = [f"key{i}" for i in range(10_000)]
    content = json.dumps(dict.fromkeys(keys, 1)) if kind == "jsonl" else f"{','.join(keys)}\n1,2\n"
    (tmp_path / f"rows.{kind}").write_text(content)
    problem = refusal(Source(path=str(tmp_path / f"rows.{kind}")))
    assert "and 9,970 more" in problem.message
    assert len(problem.message) < 1000


@pytest.mark.timeout(300)
def test_marks_on_a_character_take_little_time() -> None:
    """Python sorts combining marks: two million in the wrong order would take hours."""
    text = "a" + "\u0301" * 1_000_000 + "\u0316" * 1_000_000
    begun = time.process_time()
    assert minhash.make_comparable(text).startswith(b"\xc3\xa1")
    assert answer_text.normalized_words(text)
    assert time.process_time() - begun < 20
    hardly_any = "Tie\u0302\u0301ng Vie\u0323\u0302t a" + "\u0301" * 10 + "\u0316" * 10
    assert to_nfkc(hardly_any) == unicodedata.normalize("NFKC", hardly_any) != hardly_any


@pytest.mark.timeout(300)
def test_the_time_limit_holds_where_it_is_ignored_once() -> None:
    def ignore_once() -> None:
        with suppress(BaseException):
            while True:
                pass
        while True:
            pass

    with pytest.raises(render_limits.LimitReached, match=r"takes more than 0\.5 s"):
        render_limits.limited(ignore_once)


@pytest.mark.timeout(300)
def test_a_template_that_python_cannot_interrupt_ends_the_process(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one step in C compares ten million pairs of long texts."""
    monkeypatch.setattr(render_limits, "_GRACE_S", 0.5)
    text = "{% set a = 'a' * 10 ** 6 %}{{ ([a ~ 'b'] * 10 ** 7).count(a ~ 'c') }}"
    chat_template = ChatTemplate(AutoTokenizer.from_pretrained(str(tokenizer_dir)), text)
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        with suppress(BaseException):
            chat_template.render(CHAT)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == -signal.SIGPROF
    in_pool = parallel._failure([0, -signal.SIGTERM, code], 3)
    assert isinstance(in_pool, DataError)
    assert in_pool.problems[0].message.startswith("a chat template does not end")
    with pytest.raises(DataError, match="a chat template does not end"):
        worker_process.run_worker(["/bin/sh", "-c", "kill -PROF $$"])


@pytest.mark.parametrize("line", [False, True])
def test_a_file_that_expands_out_of_proportion_is_refused(tmp_path: Path, line: bool) -> None:
    row = json.dumps({"text": "a" * 1000}).encode() + b"\n"
    content = b'{"text": "' + b"a" * (100 << 20) if line else row * 100_000
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content, 6))
    assert (tmp_path / "rows.jsonl.gz").stat().st_size < 2 << 20
    problem = refusal(Source(path=str(tmp_path / "rows.jsonl.gz")))
    assert problem.message == "the compressed file expands to more than 200 times its size"
    assert "decompress it" in problem.remedy


def test_a_table_that_expands_out_of_proportion_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a" * (1 << 20)] * 100})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd", use_dictionary=False)
    assert refusal(Source(path=str(tmp_path / "rows.parquet"))).message == (
        "the table expands to more than 200 times the size of its file"
    )


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


@pytest.mark.parametrize("has_schema", [False, True])
def test_a_dictionary_that_many_rows_refer_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_schema: bool
) -> None:
    """A file of about one kilobyte, 4 MiB according to its metadata, expands to 400 GiB of text."""
    monkeypatch.setattr(parquet, "_MAX_BATCH_BYTES", 400 << 20)
    write_table(tmp_path / "rows.parquet", dictionary_table(["a" * (4 << 20)], [0] * 100_000), has_schema)
    assert (tmp_path / "rows.parquet").stat().st_size < 2000
    problem = refusal(Source(path=str(tmp_path / "rows.parquet")))
    assert problem.message == "the table expands to more than 200 times the size of its file"
    assert "without compression or dictionaries" in problem.remedy


@pytest.mark.rest
def test_one_row_of_a_table_that_takes_all_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_MAX_BATCH_BYTES", 100 << 20)
    texts = dictionary_table(["a" * (4 << 20)], [0] * 1000)
    for name, values in (("texts", texts), ("numbers", pyarrow.nulls(30_000_000, "int64"))):
        column = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int32()), values)
        write_table(tmp_path / f"{name}.parquet", column)
        problem = refusal(Source(path=str(tmp_path / f"{name}.parquet")))
        # Either bound may apply: memory freed by earlier tests counts only toward the file's bound.
        assert "expands to more than" in problem.message
        assert problem.where.startswith(f"{tmp_path / name}.parquet")


@pytest.mark.parametrize("has_schema", [False, True])
def test_a_table_with_large_repeated_values_is_read_in_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_schema: bool
) -> None:
    monkeypatch.setattr(parquet, "_MAX_BATCH_BYTES", 150 << 20)
    texts = [random.Random(number).randbytes(100_000).hex() for number in range(30)]
    order = [number % 30 for number in range(1500)]
    file = tmp_path / "rows.parquet"
    write_table(file, dictionary_table(texts, order), has_schema)
    rows = [row["text"] for block in files.read_blocks(file, file.name) for row, _ in files.parse_block(block)]
    assert rows == [texts[number] for number in order]


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1 << 20)
    for name in ("rows.jsonl", "rows.csv"):
        with open(tmp_path / name, "wb") as file:
            file.write(b'{"text": "one"}\n' if name == "rows.jsonl" else b"text\n")
            file.truncate(1 << 30)
        problem = refusal(Source(path=str(tmp_path / name)))
        assert (problem.message, problem.where) == ("the line is longer than 1 MiB", f"{tmp_path / name}:2")


@pytest.mark.parametrize(
    ("name", "head", "part", "message"),
    [
        ("rows.csv", 'text\nfine\n"never closed', "\nanother line", "the row is longer than 1 MiB"),
        ("rows.json", '[{"text": "fine"},\n{"text": "', "never closed ", "the entry is longer than 1 MiB"),
        ("rows.json", '[{"text": "fine"},\n{"text": [', '"", ', "the entry is longer than 1 MiB"),
    ],
)
def test_a_row_without_an_end_is_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, head: str, part: str, message: str
) -> None:
    for module in (files, json_array):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 20)
    (tmp_path / name).write_text(head + part * 5_000_000)
    tracemalloc.start()
    try:
        problem = refusal(Source(path=str(tmp_path / name)))
        assert (problem.message, problem.where.split(":")[1]) == (message, "3" if name == "rows.csv" else "2")
        # The file is larger than 20 MB.
        assert tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()


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
@pytest.mark.parametrize(
    ("head", "message"),
    [
        (f"{BOMB}configs:\n- config_name: *a8\n", "it has more than 200,000 values, with its aliases expanded"),
        ("configs: &a [*a]\n", "an alias refers to a value that contains it"),
        ("configs: " + "[" * 100_000, "the head of README.md is not"),
        ("configs:\n- data_files: '" + "**/" * 15 + "*a*a*a*a*a*a*a*a*b'\n", "no file matches the pattern"),
        ("configs:\n- data_files:\n" + "  - '*'\n" * 150_000, "README.md has too many patterns"),
    ],
)
def test_the_head_of_a_readme_cannot_take_for_ever(tmp_path: Path, head: str, message: str) -> None:
    folder = tmp_path / "/".join("a" * 12)
    folder.mkdir(parents=True)
    (folder / f"{'a' * 60}.jsonl").write_text('{"text": "a"}\n')
    for i in range(100):
        (tmp_path / f"{i}.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    started = time.process_time()
    assert message in refusal(Source(path=str(tmp_path))).message
    assert time.process_time() - started < 20


def test_a_readme_of_any_size_is_not_read(tmp_path: Path) -> None:
    """A sparse file of any size takes no space in an archive."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with (tmp_path / "README.md").open("wb") as file:
        file.truncate(1 << 40)
    assert refusal(Source(path=str(tmp_path))).message == "README.md has more than 16 MiB and is not read"


@pytest.mark.timeout(300)
def test_a_head_that_has_no_end_is_searched_once(tmp_path: Path) -> None:
    for name, content in (("rows.jsonl", '{"text": "a"}\n'), ("README.md", "---" + "\n" * 1_000_000)):
        (tmp_path / name).write_text(content)
    started = time.process_time()
    assert len(list(read_documents(Source(path=str(tmp_path))))) == 1
    assert base_front_matter(tmp_path) == {}
    assert time.process_time() - started < 20


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
