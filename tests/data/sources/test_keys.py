"""Unused keys in rows: which rows they cause to be refused, and what the report counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.sections.data import DataSection, Source
from launcher.data import cache_store
from launcher.data.build import build
from launcher.data.sources.formats import NUM_KEYS_SHOWN
from launcher.data.sources.reading import read_batches, read_documents
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


def counts_of(path: Path, **settings: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for batch in read_batches(Source(path=str(path), **settings)):
        assert list(batch.documents(counts))
    return dict(counts)


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "chosen, rejected"),
        ({"chosen": [ASKED, TWO], "rejected": [ASKED, THREE]}, "chosen, rejected"),
        ({**CHAT, "rejected_response": "3"}, "rejected_response"),
        (
            {"input": {"messages": [ASKED]}, "preferred_output": [TWO], "non_preferred_output": [THREE]},
            "preferred_output, non_preferred_output",
        ),
        ({**PAIR, "label": False}, "label"),
        ({**PAIR, "label": "False"}, "label"),
        ({"instruction": "1+1?", "output": "3", "kto_tag": False}, "kto_tag"),
        ({**CHAT, "images": ["a.png"]}, "images"),
        ({**PAIR, "image": {"bytes": None, "path": "a.png"}}, "image"),
        ({"messages": [{**ASKED, "images": ["aGk="]}, TWO]}, "images"),
    ],
)
def test_rows_for_another_kind_of_training_are_refused(jsonl: Jsonl, row: dict[str, Any], keys: str) -> None:
    path = jsonl([row])
    problem = problem_of(path)
    assert problem.where == f"{path}:1"
    assert f"ignored_keys: [{keys}]" in problem.remedy


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "label": True},
        {**PAIR, "label": 0},
        {"text": "1+1=3", "label": False},
        {**PAIR, "chosen": True, "rejected": False},
        {**PAIR, "chosen": "2", "rejected": ""},
        {**CHAT, "images": [], "videos": None, "audio": ""},
        {**CHAT, "images": [None], "image": False, "video": 3},
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
        ({"conversations": [{"from": "human", "value": "a", "name": "b"}]}, {"conversations[].name"}),
        ({"messages": [{"from": "human", "value": "a", "markdown": "b"}]}, {"messages[].markdown"}),
        ({"instruction": "a", "output": "b", "input": "", "history": [], "topic": "c"}, {"topic"}),
        ({**PAIR, "system": "a", "source": ""}, {"system"}),
        ({"text": "a", "url": "b", "year": 0}, {"url", "year"}),
    ],
)
def test_keys_that_no_format_reads_are_counted(jsonl: Jsonl, row: dict[str, Any], unread: set[str]) -> None:
    assert counts_of(jsonl([row, row])) == dict.fromkeys(unread, 2)


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
