"""Unused keys in rows: which rows they cause to be refused, and what the report counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launcher.cli.views.data_view import unread_keys
from launcher.config.sections.data import DataSection, Source
from launcher.data.build import build
from launcher.data.cache import cache_store
from launcher.data.sources import read_batches, read_documents
from launcher.data.sources.keys import NUM_KEYS_SHOWN, KeyCounts
from launcher.errors import DataError, Problem

Jsonl = Callable[..., Path]

ASKED = {"role": "user", "content": "1+1?"}
TWO = {"role": "assistant", "content": "2"}
THREE = {"role": "assistant", "content": "3"}
CHAT = {"messages": [ASKED, TWO]}
PAIR = {"prompt": "1+1=", "completion": "2"}


def problem_of(path: Path, **settings: Any) -> Problem:
    with pytest.raises(DataError) as caught:
        list(read_documents(Source(path=str(path), **settings)))
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(("folder", "shown"), [("rows", "{path}"), ("my rows", '"{path}"'), ("it's", "PATH")])
def test_the_remedy_names_the_file_so_that_it_can_be_copied(tmp_path: Path, folder: str, shown: str) -> None:
    path = tmp_path / folder / "a.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({**PAIR, "label": False}) + "\n")
    remedy = problem_of(path).remedy
    assert f"'data.sources=[{{name: train, path: {shown.format(path=path)}, ignored_keys: [label]}}]' data.path=null" in remedy
    _, _, words = remedy.partition("'")
    if folder != "it's":
        override = f"'{words}".partition("' ")[0].strip("'")
        (source,) = OverridesParser.create().parse_override(override).value()
        assert source["path"] == str(path)


def counts_of(path: Path, **settings: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for batch in read_batches(Source(path=str(path), **settings)):
        assert list(batch.documents(counts))
    return dict(counts)


@pytest.mark.parametrize(
    ("row", "words", "remedy"),
    [
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "chosen and rejected", "columns: {completion: chosen}"),
        ({"instruction": "1+1?", "chosen": "2", "rejected": "3"}, "chosen and rejected", "columns: {output: chosen}"),
        ({"chosen": [ASKED, TWO], "rejected": [ASKED, THREE]}, "chosen and rejected", "columns: {messages: chosen}"),
        ({"prompt": "1+1?", "chosen": [ASKED, TWO], "rejected": [ASKED, THREE]}, "rejected", "columns: {messages: chosen}"),
        (
            {"prompt": [ASKED], "chosen": [TWO], "rejected": [THREE]},
            "chosen and rejected",
            "into one list under the key messages",
        ),
        ({"question": "1+1?", "chosen": "2", "rejected": "3"}, "rejected", "columns: {prompt: QUESTION, completion: chosen}"),
        ({**CHAT, "chosen": TWO, "rejected": THREE}, "chosen and rejected", "ignored_keys: [chosen, rejected]"),
        ({**CHAT, "rejected_response": "3"}, "rejected_response", "ignored_keys: [rejected_response]"),
        (
            {"input": {"messages": [ASKED]}, "preferred_output": [TWO], "non_preferred_output": [THREE]},
            "preferred_output and non_preferred_output",
            "into one list under the key messages",
        ),
        ({**PAIR, "label": False}, "label marks the answer as bad", "ignored_keys: [label]"),
        ({**CHAT, "label": False}, "label marks the answer as bad", "ignored_keys: [label]"),
        ({"instruction": "1+1?", "output": "3", "kto_tag": False}, "kto_tag marks the answer as bad", "ignored_keys: [kto_tag]"),
        ({**CHAT, "images": ["a.png"]}, "the row has images", "ignored_keys: [images]"),
        ({**PAIR, "image": {"bytes": None, "path": "a.png"}}, "the row has image", "ignored_keys: [image]"),
        ({"messages": [{**ASKED, "images": ["aGk="]}, TWO]}, "messages[0] has images", "ignored_keys: [images]"),
        ({"text": "1+1=2", "input_ids": [1, 2], "labels": [-100, 2]}, "input_ids, labels", "ignored_keys: [input_ids, labels]"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "input_ids, labels", "write rows of text"),
        ({**PAIR, "weight": 0}, "a loss weight other than 1", "ignored_keys: [weight]"),
        ({**CHAT, "sample_weight": 0.5}, "a loss weight other than 1", "ignored_keys: [sample_weight]"),
    ],
)
def test_rows_for_another_kind_of_training_are_refused(jsonl: Jsonl, row: dict[str, Any], words: str, remedy: str) -> None:
    path = jsonl([row])
    problem = problem_of(path)
    assert words in problem.message
    assert problem.where == f"{path}:1"
    assert remedy in problem.remedy


def test_a_later_row_for_another_kind_of_training_is_refused(jsonl: Jsonl) -> None:
    path = jsonl([{**PAIR, "label": True}, {**PAIR, "label": False}])
    problem = problem_of(path)
    assert (problem.where, problem.value) == (f"{path}:2", "label: false")


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "label": True},
        {**PAIR, "label": 0},
        {"text": "1+1=3", "label": False},
        {**PAIR, "chosen": True, "rejected": False},
        {**PAIR, "chosen": "2", "rejected": ""},
        {**PAIR, "rejected": "3"},
        {**CHAT, "images": [], "videos": None, "audio": ""},
        {**CHAT, "images": [None], "image": False, "video": 3},
        {**PAIR, "weight": 1.0, "sample_weight": float("nan")},
        {**PAIR, "weight": "heavy"},
        {"text": "1+1=2", "input_ids": [1, 2]},
    ],
)
def test_rows_with_harmless_values_of_preference_keys_are_read(jsonl: Jsonl, row: dict[str, Any]) -> None:
    assert len(list(read_documents(Source(path=str(jsonl([row])))))) == 1


@pytest.mark.parametrize(
    ("row", "settings", "unread"),
    [
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, {"columns": {"completion": "chosen"}}, {"rejected": 1}),
        ({"chosen": [ASKED, TWO], "rejected": [ASKED, THREE]}, {"columns": {"messages": "chosen"}}, {"rejected": 1}),
        ({**CHAT, "chosen": TWO, "rejected": THREE}, {"ignored_keys": ("rejected",)}, {"chosen": 1, "rejected": 1}),
        ({**PAIR, "label": False}, {"ignored_keys": ("label",)}, {"label": 1}),
        ({**PAIR, "text": "1+1=2"}, {"ignored_keys": ("text",)}, {"text": 1}),
        ({**CHAT, "system": "Add."}, {"ignored_keys": ("system",)}, {"system": 1}),
        ({"messages": [{**ASKED, "images": ["a"]}, TWO]}, {"ignored_keys": ("images",)}, {"messages[].images": 1}),
    ],
)
def test_chosen_columns_and_ignored_keys_make_a_row_trainable(
    jsonl: Jsonl, row: dict[str, Any], settings: dict[str, Any], unread: dict[str, int]
) -> None:
    path = jsonl([row])
    assert counts_of(path, **settings) == unread
    assert "Add." not in str(list(read_documents(Source(path=str(path), **settings))))


@pytest.mark.rest
def test_ignored_keys_hold_for_the_held_out_file(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    train = jsonl([{"prompt": f"{i} is", "completion": f" {i}", "label": i % 2 == 0} for i in range(20)], "train.jsonl")
    held_out = jsonl([{**PAIR, "label": False}], "held_out.jsonl")
    data = DataSection(sources=(Source(path=str(train), ignored_keys=("label",)),), eval_path=str(held_out), max_length=64)
    sources = cache_store.read_report(build(data, str(tokenizer_dir)).cache_dir)["sources"]
    assert [source["unread_keys"] for source in sources] == [{"label": 20}, {"label": 1}]


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        (
            {
                "messages": [{**ASKED, "id": 1, "name": "me"}, {**TWO, "id": 2, "refusal": None, "weight": 1}],
                "tools": [],
                "id": 0,
                "meta": {},
            },
            {"id", "messages[].id"},
        ),
        ({"messages": [{**ASKED, "content": [{"type": "text", "text": "1", "foo": 1}]}, TWO]}, {"messages[].content[].foo"}),
        ({"conversations": [{"from": "human", "value": "a", "name": "b"}]}, {"conversations[].name"}),
        ({"messages": [{"from": "human", "value": "a", "markdown": "b"}]}, {"messages[].markdown"}),
        ({"instruction": "a", "output": "b", "input": "", "history": [], "topic": "c"}, {"topic"}),
        ({**PAIR, "system": "a", "source": ""}, {"system"}),
        ({"text": "a", "url": "b", "year": 0}, {"url", "year"}),
    ],
)
def test_keys_that_no_format_reads_are_counted(jsonl: Jsonl, row: dict[str, Any], unread: set[str]) -> None:
    assert counts_of(jsonl([row, row])) == dict.fromkeys(unread, 2)


def test_a_key_hidden_by_a_mapped_column_is_counted(jsonl: Jsonl) -> None:
    row = {"question": "1+1=", "answer": "2", "prompt": "hidden", "text": "hidden", "chat": 1}
    columns = {"prompt": "question", "completion": "answer"}
    assert counts_of(jsonl([row]), columns=columns, format="prompt_completion") == {"prompt": 1, "text": 1, "chat": 1}


def test_unread_keys_of_tables_are_counted(tmp_path: Path) -> None:
    messages = [{**ASKED, "mood": None}, {**TWO, "mood": "good"}]
    table, text, plain = tmp_path / "a.parquet", tmp_path / "a.csv", tmp_path / "a.txt"
    rows = [{"messages": messages, "id": 1, "images": []}, {"messages": messages, "id": None, "images": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    quoted = json.dumps(messages).replace('"', '""')
    text.write_text(f'messages,id,images,rejected\n"{quoted}",1,[],\n"{quoted}",,[],\n')
    plain.write_text("one\ntwo\n")
    assert counts_of(table) == {"messages[].mood": 2, "id": 1}
    assert counts_of(text) == {"messages[].mood": 2, "id": 1}
    assert counts_of(plain) == {}
    text.write_text("prompt,completion,label\na,b,True\na,b,False\n")
    assert "label marks the answer as bad" in problem_of(text).message


def test_the_report_lists_the_most_frequent_keys(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    secret = "hf_" + "aB3" * 11
    rows = [{"text": f"text number {i}", f"key {i}": 1, "id": i, **({secret: 1} if i else {})} for i in range(300)]
    sources = (Source(name="a", path=str(jsonl(rows))), Source(name="b", path=str(jsonl([PAIR], "b.jsonl"))))
    data = DataSection(sources=sources, max_length=64, workers=1)
    first, second = cache_store.read_report(build(data, str(tokenizer_dir)).cache_dir)["sources"]
    (id_key, *_), (hidden, num_hidden), (key, count), *_ = first["unread_keys"].items()
    assert (id_key, first["unread_keys"]["id"], num_hidden, count) == ("id", 300, 299, 1)
    assert hidden.startswith("[Hugging Face token")
    assert key == "key 0"
    assert (len(first["unread_keys"]), first["num_other_unread_keys"]) == (NUM_KEYS_SHOWN, 302 - NUM_KEYS_SHOWN)
    assert (second["unread_keys"], second["num_other_unread_keys"]) == ({}, 0)
    (line,) = unread_keys({"sources": [first, second]})
    assert line.startswith("a: unread keys (rows): id (300), [Hugging Face token")
    assert line.endswith(f" (1), and {302 - NUM_KEYS_SHOWN} more")


def test_counts_take_bounded_memory() -> None:
    counts = KeyCounts()
    for batch in range(100):
        counts.add({"id": 100, **{f"{batch} {i}": 1 for i in range(100)}})
        assert len(counts._counts) <= 2100
    values = counts.to_json()
    assert values["unread_keys"]["id"] == 10_000
    assert values["num_other_unread_keys"] == 10_001 - NUM_KEYS_SHOWN
