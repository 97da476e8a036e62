"""Rows in common formats are read as documents; keys that no format reads are counted, or refuse the row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.sections.data import DataSection, Source
from launcher.data import cache_store
from launcher.data.build import build
from launcher.data.sources.documents import Document, Message
from launcher.data.sources.formats import NUM_KEYS_SHOWN
from launcher.data.sources.reading import read_batches, read_documents
from launcher.errors import DataError, Problem

Jsonl = Callable[..., Path]

ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def first(path: Path, **settings: Any) -> Any:
    return next(document for document, _ in read_documents(Source(path=str(path), **settings)))


def test_openais_fine_tuning_rows_are_read_as_they_are(jsonl: Jsonl) -> None:
    messages = [
        {"role": "system", "content": "You add."},
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+2?"}]},
        {"role": "assistant", "content": None, "weight": 0, "tool_calls": [{"id": "c1", **CALL}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "assistant", "content": "3.", "weight": 1, "name": "adder"},
    ]
    # OpenAI encodes the arguments as a JSON string.
    messages[2]["tool_calls"][0]["function"] = {"name": "add", "arguments": '{"a": 1, "b": 2}'}  # type: ignore[index]
    path = jsonl([{"messages": messages, "tools": [ADD], "parallel_tool_calls": False}])
    assert first(path) == Document(
        f"{path}:1",
        (
            Message("system", "You add."),
            Message("user", "1+2?"),
            Message("assistant", "", tool_calls=({"id": "c1", **CALL},), weight=0),
            Message("tool", "3", tool_call_id="c1"),
            Message("assistant", "3.", weight=1, name="adder"),
        ),
        (ADD,),
    )


def test_openais_older_function_rows_and_developer_messages(jsonl: Jsonl) -> None:
    messages = [
        {"role": "developer", "content": "You add."},
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
        {"role": "function", "name": "add", "content": "3"},
        {"role": "assistant", "content": "3.", "reasoning_content": "Add them."},
    ]
    path = jsonl([{"messages": messages, "functions": [ADD["function"]]}])
    document = first(path)
    assert [message.role for message in document.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert document.messages[2].tool_calls == (CALL,)
    assert document.messages[4].reasoning_content == "Add them."
    assert document.tools == (ADD,)


def test_sharegpt_with_tools(jsonl: Jsonl) -> None:
    turns = [
        ("human", "1+2?"),
        ("function_call", json.dumps(CALL["function"])),
        ("observation", "3"),
        ("gpt", "3."),
    ]
    row = {
        "conversations": [{"from": sender, "value": value} for sender, value in turns],
        "system": "You add.",
        "tools": json.dumps([ADD["function"]]),
    }
    path = jsonl([row])
    assert first(path) == Document(
        f"{path}:1",
        (
            Message("system", "You add."),
            Message("user", "1+2?"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "3"),
            Message("assistant", "3."),
        ),
        (ADD,),
    )


@pytest.mark.parametrize("input", ["", None, "  ", "More."])
def test_alpaca(jsonl: Jsonl, input: str | None) -> None:
    path = jsonl([{"instruction": "Do.", "input": input, "output": "Done.", "history": [["Hi", "Hello"]]}])
    question = "Do.\n\nMore." if input == "More." else "Do."
    assert [(message.role, message.content) for message in first(path).messages] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", question),
        ("assistant", "Done."),
    ]


def test_the_kind_of_messages_is_detected_by_their_keys(jsonl: Jsonl) -> None:
    expected = (Message("user", "a"), Message("assistant", "b"))
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    openai = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert first(jsonl([{"messages": sharegpt}], "a.jsonl")).messages == expected
    assert first(jsonl([{"conversations": openai}], "b.jsonl")).messages == expected


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ({"loss_weight": 0}, 0),
        ({"loss_weight": 1.0}, 1),
        ({"train": False}, 0),
        ({"training": True}, 1),
        ({"loss": False}, 0),
        ({"loss_mask": 1}, 1),
        ({"masked": True}, 0),
        ({"masked": False, "weight": 1, "loss": True}, 1),
        ({"weight": None, "loss": None, "mask": None, "train_detail": []}, None),
    ],
)
def test_weights_as_other_tools_write_them(jsonl: Jsonl, flags: dict[str, Any], weight: int | None) -> None:
    question = {"role": "user", "content": "a", **dict.fromkeys(flags)}
    openai = jsonl([{"messages": [question, {"role": "assistant", "content": "b", **flags}]}], "a.jsonl")
    sharegpt = jsonl([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **flags}]}], "b.jsonl")
    for path in (openai, sharegpt):
        assert [message.weight for message in first(path).messages] == [None, weight]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        ([{"role": "user"}], "lacks the key messages[0].content (found: role)"),
        ([{"role": "user", "content": 3}], "messages[0].content is a number, not text"),
        ([{"role": "narrator", "content": "a"}], "messages[0].role is unknown: 'narrator'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0] has the type image_url, not text"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], "messages[0].weight is 0.5, not 0 or 1"),
        ([{"role": "assistant", "content": "a", "mask": 0}], "messages[0] sets its loss weight with mask"),
        ([{"role": "assistant", "content": "a", "masked": "no"}], "messages[0].masked is "),
        (
            [{"role": "assistant", "content": "a", "weight": 0, "train": True}],
            "messages[0] has keys that contradict each other about its training (weight and train)",
        ),
        ([{"role": "user", "content": "a", "weight": 1}], "messages[0].weight trains a message"),
        ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "messages[0] calls a tool, but its role is not assistant"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "1, 2"}}]}],
            "messages[0].tool_calls[0]: the arguments of add are not a JSON object",
        ),
    ],
)
def test_an_unusable_message_is_reported_with_its_place(jsonl: Jsonl, messages: list[Any], words: str) -> None:
    path = jsonl([{"messages": messages}])
    with pytest.raises(DataError) as caught:
        first(path, format="messages")
    (problem,) = caught.value.problems
    assert words in problem.message
    assert problem.where == f"{path}:1"
    assert problem.remedy
    assert "columns" not in problem.remedy, "they name keys of the row"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "conversations[0].from is unknown: 'narrator'"),
        ({"conversations": [{"from": "human", "value": "a", "loss": True}]}, "loss trains a message with the role human"),
        ({"instruction": "a", "output": None}, "output is null, not text"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "history[0] is not a pair of texts"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [3]}, "tools[0] does not describe a function"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "the key system and a system message"),
        ({"messages": [], "text": "a"}, "fits the formats messages and text"),
        ({"instruction": "a", "response": "b"}, "no known format (found: instruction, response)"),
    ],
)
def test_an_unusable_row_is_reported_with_its_place(jsonl: Jsonl, row: dict[str, Any], words: str) -> None:
    path = jsonl([row])
    with pytest.raises(DataError) as caught:
        first(path)
    (problem,) = caught.value.problems
    assert words in problem.message
    assert problem.where == f"{path}:1"
    assert problem.remedy


# A secret that ends up in error messages when `from` and `value` are swapped or a CSV file has no header.
SAID = "Here you are - as you have asked me to: hf_" + "aB3" * 11 + " and more" * 500


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": SAID, "value": "gpt"}]},
        {SAID: "a"},
        f"{SAID},{SAID}\na,b\n",
    ],
)
def test_an_excerpt_of_a_value_is_short_and_redacted(jsonl: Jsonl, tmp_path: Path, row: dict[str, Any] | str) -> None:
    path = tmp_path / "rows.csv"
    if isinstance(row, str):
        path.write_text(row)
    else:
        path = jsonl([row])
    with pytest.raises(DataError) as caught:
        first(path)
    (problem,) = caught.value.problems
    assert "Here you are - as you have asked me to: …" in problem.message
    assert f"({len(SAID):,} characters)" in problem.message
    assert "hf_aB3" not in problem.message
    assert len(problem.message) < 250


def test_conversational_prompts_and_completions_train_the_completion_alone(jsonl: Jsonl) -> None:
    asked = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}, {"role": "user", "content": "2?"}]
    answer = [{"role": "assistant", "content": "two"}]
    path = jsonl([{"prompt": asked, "completion": answer, "tools": [ADD]}])
    document = first(path)
    assert [(message.role, message.weight) for message in document.messages] == [
        ("user", None),
        ("assistant", 0),
        ("user", None),
        ("assistant", None),
    ]
    assert document.tools == (ADD,)
    assert first(jsonl([{"prompt": asked, "completion": "two"}])).messages == document.messages
    assert first(jsonl([{"prompt": "2?", "completion": answer}])).messages == document.messages[2:]
    with pytest.raises(DataError, match="completion has no message with the role assistant"):
        first(jsonl([{"prompt": asked, "completion": asked[:1]}]))
    with pytest.raises(DataError, match=r"prompt\[0\] has images"):
        first(jsonl([{"prompt": [{**asked[0], "images": ["a.png"]}], "completion": answer}]))


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "value": "Hi"}],
        [{"type": "input_text", "text": "Hi"}],
        [{"type": "text", "content": "H"}, {"type": "output_text", "text": "i"}],
        {"type": "text", "text": "Hi"},
    ],
)
def test_text_parts_of_other_apis_are_read(jsonl: Jsonl, content: Any) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes"}]
    assert first(jsonl([{"messages": messages}])).messages[0].content == "Hi"


def test_keys_within_objects_are_named_with_dots(jsonl: Jsonl) -> None:
    row = {"id": 1, "data": {"question": "1?", "answers": {"text": ["one"]}}}
    path = jsonl([row])
    document = first(path, columns={"question": "data.question", "answer": "data.answers.text.0"})
    assert (document.prompt, document.text) == ("1?", "one")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "images": ["x.png"]}]
    with pytest.raises(DataError, match=r"messages\[1\] has images"):
        first(jsonl([{"data": {"turns": turns}}]), columns={"messages": "data.turns"})
    turns[1].pop("images")
    assert len(first(jsonl([{"data": {"turns": turns}}]), columns={"messages": "data.turns"}).messages) == 2
    with pytest.raises(DataError, match=r"lacks the key data\.wrong, which columns\.question names"):
        first(path, columns={"question": "data.wrong", "answer": "data.question"})


def test_a_question_with_a_context_is_not_read_without_it(jsonl: Jsonl) -> None:
    row = {"question": "Who?", "answer": "She", "context": "She came."}
    with pytest.raises(DataError, match="and also context, which is not read"):
        first(jsonl([row]))
    assert first(jsonl([row]), format="question_answer").text == "She"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_key_that_an_object_has_twice_is_refused(tmp_path: Path, name: str) -> None:
    line = '{"prompt": "a", "completion": "b", "completion": "c"}'
    path = tmp_path / name
    path.write_text(line if name.endswith("l") else f'[{{"prompt": "a", "completion": "b"}}, {line}]')
    with pytest.raises(DataError, match="has the key completion twice in one object") as caught:
        list(read_documents(Source(path=str(path))))
    assert caught.value.problems[0].where == (f"{path}:1" if name.endswith("l") else f"{path}:row 2")


# Keys that no format reads

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
        ({**PAIR, "label": False}, {"ignored_keys": ("label",)}, {}),
        ({**PAIR, "text": "1+1=2"}, {"ignored_keys": ("text",)}, {}),
        ({**CHAT, "system": "Add."}, {"ignored_keys": ("system",)}, {}),
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
