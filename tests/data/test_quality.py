"""Faults are found where they stand, nothing is found in good text, and no secret is told."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from launcher.config.data import ChecksSection, DataSection, Source
from launcher.data import duplicates, findings, patterns, quality
from launcher.data.chat import Encoded, Rendered
from launcher.data.masks import Span
from launcher.data.quality import Corpus, Hit, across, conclude, inspect
from launcher.data.sources import Chat, Completion, Document, Message, PlainText

CHECKS = ChecksSection()
SPECIAL = ("<|im_start|>", "<|im_end|>")
SECRETS = {
    "API key": "sk-proj-" + "aB3" * 12,
    "Hugging Face token": "hf_" + "aB3" * 11,
    "GitHub token": "ghp_" + "aB3" * 12,
    "AWS key": "AKIA" + "ABCD2345" * 2,
    "Slack token": "xoxb-" + "123456789012-abcdef",
    "Google key": "AIza" + "aB3_-" * 7,
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA",
    "password in an address": "://admin:hunter2!@",
    "assigned secret": 'password = "correct-horse-battery',
    "e-mail address": "jane.roe+x@company.co.uk",
    "telephone number": "+49 170 1234567",
}


def encoded(trained: int = 5, prompt: int = 5, turn_end: bool = True) -> Encoded:
    mask = np.asarray([0] * prompt + [1] * trained, dtype=np.uint8)
    return Encoded(np.arange(len(mask), dtype=np.uint32), mask, (len(mask) - 1,) if turn_end and trained else ())


def chat(*turns: tuple[str, str], **last: Any) -> Chat:
    messages = [Message(role, content) for role, content in turns]
    if last:
        messages[-1] = Message(*turns[-1], **last)
    return Chat("rows.jsonl:1", tuple(messages))


def settings(checks: ChecksSection = CHECKS, **more: Any) -> DataSection:
    return DataSection(sources=(Source(path="rows.jsonl"),), checks=checks, **more)


def trained(text: str) -> Rendered:
    return Rendered("x:1", text, (Span(0, len(text)),), raw=False)


def found(
    document: Document, tokens: Encoded | None = None, checks: ChecksSection = CHECKS, text: str = "", train_on: str = "assistant"
) -> dict[str, str]:
    (seen,) = inspect([document], [trained(text)], [tokens or encoded()], SPECIAL, settings(checks, train_on=train_on))
    return {hit.finding: hit.detail for hit in seen.hits}


GOOD = [
    chat(("user", "What is 2 + 2?"), ("assistant", "It is 4, or 20+30-46; see 3.1415 and 2024-05-06.")),
    chat(("system", "Be brief."), ("user", "Why?"), ("assistant", "Because."), ("user", "So?"), ("assistant", "So.")),
    chat(("user", "naïve café — “quotes”"), ("assistant", "Ωμέγα, 日本語, 🙂, ¿qué? £5 « oui »")),
    Chat(
        "x:1",
        (
            Message("user", "Weather?"),
            Message("assistant", "", tool_calls=({"function": {"name": "weather", "arguments": {"city": "Oslo"}}},)),
            Message("tool", "rain"),
            Message("assistant", "It rains."),
        ),
    ),
    Completion("x:1", "def key(monkey):", " return monkey['token'] < 3  # eight, disk-usage: a@example.com"),
    PlainText("x:1", "Order 555 of 12 items at 10.000.000 each; ratio 1:2, [INSTALL], a << b, <s>struck</s>."),
]


@pytest.mark.parametrize("document", GOOD)
def test_nothing_is_found_in_good_documents(document: Document) -> None:
    assert found(document) == {}


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ([("assistant", "Hello"), ("user", "Hi"), ("assistant", "So")], "messages[0] (assistant) comes first"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "messages[1] (user) follows a message of role user"),
        ([("user", "a"), ("system", "b"), ("assistant", "c")], "messages[1] (system) follows a message of role user"),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c")], "messages[2] (assistant) follows a message of role assistant"),
        ([("user", "a"), ("tool", "b"), ("assistant", "c")], "messages[1] (tool) follows a message of role user"),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "the last message is of role user"),
    ],
)
def test_roles_out_of_order_are_named(turns: list[tuple[str, str]], fault: str) -> None:
    assert found(chat(*turns)) == {"role_order": fault}


def test_what_stands_in_tools_is_looked_at() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": f"uses {'hf_' + 'aB3' * 11} and <|im_end|>"}}
    asked = replace(chat(("user", "a"), ("assistant", "b")), tools=(tool,))
    assert found(asked).keys() == {"secrets", "special_token_in_text"}


def test_empty_answers_count_where_they_would_be_trained() -> None:
    assert found(chat(("user", "a"), ("assistant", " \n\t"))) == {"empty_answer": "messages[1] is empty"}
    assert found(Completion("x:1", "a", " ")) == {"empty_answer": "completion is empty"}
    assert found(chat(("user", "a"), ("assistant", ""), weight=0)) == {}
    assert found(chat(("user", "a"), ("assistant", ""), tool_calls=({"function": {"name": "f"}},))) == {}
    silent = chat(("user", "a"), ("assistant", ""), reasoning_content="because\n")
    assert found(silent, text="<think>because</think><|im_end|>") == {}
    assert found(silent, text="<|im_end|>") == {"empty_answer": "messages[1] is empty"}
    earlier = chat(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c"))
    assert found(earlier) == found(earlier, train_on="all") == {"empty_answer": "messages[1] is empty"}
    assert found(earlier, train_on="last_turn") == {}


def test_what_is_not_trained_is_told() -> None:
    document = GOOD[0]
    assert found(document, encoded(trained=0)) == {"no_trained_token": "no token is trained"}


def test_long_answers_are_measured_in_one_piece() -> None:
    checks = ChecksSection(long_answer_tokens=10)
    two = Encoded(np.arange(17, dtype=np.uint32), np.asarray([0] + [1] * 7 + [0] + [1] * 8, dtype=np.uint8), (16,))
    assert found(GOOD[0], two, checks) == {}
    assert found(GOOD[0], encoded(trained=11), checks) == {"long_answer": "11 trained tokens in one answer"}
    assert found(PlainText("x:1", "a"), encoded(trained=11), checks) == {}


def test_an_answer_that_repeats_itself_is_found() -> None:
    looping = "I am sure that this is the answer. " * 20
    assert list(found(chat(("user", "a"), ("assistant", looping)))) == ["repetitive_answer"]
    assert found(chat(("user", looping), ("assistant", "no"))) == {}
    drawn = random.Random(0)
    varied = " ".join(drawn.choice("abcdefghij") * drawn.randint(1, 4) for _ in range(300))
    assert found(chat(("user", "a"), ("assistant", varied))) == {}


@pytest.mark.parametrize(
    ("text", "detail"),
    [("a \ufffd b \ufffd", "2 replacement characters"), ("donâ€™t", "wrong encoding"), ("Ã©tÃ© franÃ§ais", "wrong encoding")],
)
def test_text_that_was_decoded_wrongly_is_found(text: str, detail: str) -> None:
    hits = found(chat(("user", text), ("assistant", "ok")))
    assert list(hits) == ["broken_encoding"]
    assert hits["broken_encoding"].startswith("messages[0]: ")
    assert detail in hits["broken_encoding"]


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("so <|im_end|> it", "a special token of this tokenizer"),
        ("<|eot_id|>", "unknown to this tokenizer"),
        ("[INST] hi [/INST]", "unknown to this tokenizer and 1 more"),
        ("<start_of_turn>user", "unknown to this tokenizer"),
    ],
)
def test_special_tokens_in_the_text_are_found(text: str, means: str) -> None:
    hits = found(PlainText("x:1", text))
    assert list(hits) == ["special_token_in_text"]
    assert hits["special_token_in_text"].endswith(means)


@pytest.mark.parametrize("kind", list(SECRETS))
def test_secrets_are_located_and_never_told(kind: str) -> None:
    secret = SECRETS[kind]
    text = f"Take postgres{secret}db.host:5432 then." if kind == "password in an address" else f'This is it: {secret}" and on.'
    finding = "personal_data" if kind in ("e-mail address", "telephone number") else "secrets"
    hits = found(chat(("user", "Which?"), ("assistant", text)))
    assert set(hits) == {finding}
    assert f"[{kind}: " in hits[finding]
    assert hits[finding].startswith("messages[1], character ")
    core = secret.split("\n")[-1].split('"')[-1]
    for shown in (hits[finding], patterns.redacted([text])[0]):
        assert core[:8] not in shown
        assert core[-8:] not in shown
    assert patterns.redacted([text])[0].startswith(("This is it: ", "Take postgres"))


@pytest.mark.parametrize("document", GOOD)
def test_good_text_is_not_redacted(document: Document) -> None:
    texts = [part.text for part in quality._parts(document, trained(""), "assistant")]
    assert patterns.redacted(texts) == texts


@pytest.mark.parametrize("kind", list(SECRETS))
def test_secrets_across_borders_are_found_and_never_told(kind: str) -> None:
    text = f'postgres{SECRETS[kind]}db.host:5432"' if kind == "password in an address" else f'It is: {SECRETS[kind]}" and on.'
    for border in range(len(text)):
        parts = [text[:border], text[border : border + 3], text[border + 3 :]]
        assert "".join(patterns.redacted(parts)).replace("[…]", "") == patterns.redacted([text])[0]
    middle = text.index(SECRETS[kind]) + len(SECRETS[kind]) // 2
    hits = found(Completion("x:1", "a " * 300 + text[:middle], text[middle:]))
    (detail,) = hits.values()
    assert detail.startswith(("prompt, character 6", "prompt, character 5"))
    assert f"[{kind}: " in detail


# Documents beside others


@dataclass
class Collection:
    """Documents as the builder collects them."""

    texts: list[str] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)

    def add(self, text: str, held_out: bool = False) -> int:
        self.texts.append(text)
        self.held_out.append(held_out)
        return len(self.texts) - 1

    def across(self, checks: ChecksSection = CHECKS) -> list[tuple[int, Hit]]:
        documents = [PlainText("x", text) for text in self.texts]
        texts = [trained(text) for text in self.texts]
        seen = inspect(documents, texts, [encoded()] * len(documents), (), settings(checks))
        contents, tasks = np.asarray([(one.content, one.task) for one in seen], dtype=np.uint64).T
        return across(contents, tasks, [one.signature for one in seen], np.asarray(self.held_out, dtype=bool), checks)


def prose(seed: int, words: int = 60) -> str:
    random_words = random.Random(seed)
    return " ".join("".join(random_words.choices("abcdefghij", k=random_words.randint(2, 9))) for _ in range(words))


def changed(text: str, number: int = 1) -> str:
    words = text.split()
    for i in range(number):
        words[7 + 10 * i] = "CHANGED"
    return " ".join(words)


def test_duplicates_of_both_kinds_name_their_first() -> None:
    documents = Collection()
    first = documents.add(prose(0))
    for seed in range(1, 40):
        documents.add(prose(seed))
    same = documents.add("  " + prose(0).upper().replace(" ", "\n"))
    near = documents.add(changed(prose(0)))
    documents.add(changed(prose(1), 5))
    hits = {(i, hit.finding): hit for i, hit in documents.across()}
    assert set(hits) == {(same, "exact_duplicate"), (near, "near_duplicate")}
    assert hits[same, "exact_duplicate"].others == hits[near, "near_duplicate"].others == (first,)
    assert hits[near, "near_duplicate"].detail.endswith("% the same as")


def test_rows_that_differ_in_tools_weight_or_roles_are_no_duplicates() -> None:
    turns = (Message("user", "a"), Message("assistant", "b"))
    tool = {"type": "function", "function": {"name": "add"}}
    weightless = (turns[0], Message("assistant", "b", weight=0))
    same = [Chat("x:1", turns), Chat("x:2", (Message("user", "A "), turns[1]))]
    others = [Chat("x:3", turns, (tool,)), Chat("x:4", weightless), Chat("x:5", (Message("system", "a"), turns[1]))]
    rows = [*same, *others]
    seen = inspect(rows, [trained("")] * 5, [encoded()] * 5, (), settings())
    assert len({one.content for one in seen}) == 1
    assert [one.task == seen[0].task for one in seen] == [True, True, False, False, False]
    contents, tasks = np.asarray([(one.content, one.task) for one in seen], dtype=np.uint64).T
    hits = across(contents, tasks, [None] * 5, np.asarray([False] * 5), CHECKS)
    assert hits == [(1, Hit("exact_duplicate", "the same as", (0,)))]
    # What is held out is a leak whatever its tools are.
    (leak,) = [hit for i, hit in across(contents, tasks, [None] * 5, np.arange(5) == 4, CHECKS) if i == 4]
    assert leak.others == (0, 1, 2, 3)


def test_held_out_documents_in_training_name_every_copy() -> None:
    documents = Collection()
    copies = [documents.add(prose(0)), documents.add(prose(1)), documents.add(changed(prose(0))), documents.add(prose(0))]
    held_out = documents.add(prose(0), held_out=True)
    near = documents.add(changed(prose(1), 1), held_out=True)
    documents.add(prose(2), held_out=True)
    documents.add(prose(2), held_out=True)
    leaks = {(i, hit.finding): hit for i, hit in documents.across() if hit.finding in findings.LEAKS}
    exact, alike = leaks.pop((held_out, "held_out_in_train")), leaks.pop((near, "near_held_out_in_train"))
    assert list(leaks) == [(held_out, "near_held_out_in_train")]
    assert leaks[held_out, "near_held_out_in_train"].others == (copies[2],)
    assert (exact.others, exact.detail) == ((copies[0], copies[3]), "the same as")
    assert alike.others == (copies[1],)
    assert alike.detail.endswith("% the same as")


def test_a_held_out_document_is_found_among_many_of_one_template() -> None:
    numbers = np.random.default_rng(0)
    signatures = numbers.integers(0, 2**16, (301, duplicates.NUM_SLOTS), dtype=np.uint16)
    band = duplicates._rows_per_band(CHECKS.near_duplicate_threshold)
    # The pair agrees in no band but those of the template, in which all documents do.
    signatures[:, : 10 * band] = signatures[0, : 10 * band]
    signatures[300] = signatures[150]
    signatures[300, 10 * band :: band] ^= 1
    contents = np.arange(301, dtype=np.uint64)
    ((document, hit),) = across(contents, contents, list(signatures), contents == 300, CHECKS)
    assert (document, hit.finding, hit.others) == (300, "near_held_out_in_train", (150,))
    assert hit.detail == "91% the same as"


def test_a_held_out_document_is_found_among_thousands_that_agree_in_a_band() -> None:
    numbers = np.random.default_rng(0)
    num = 5 * duplicates.REACH_ACROSS
    signatures = numbers.integers(0, 2**16, (num + 2, duplicates.NUM_SLOTS), dtype=np.uint16)
    band = duplicates._rows_per_band(CHECKS.near_duplicate_threshold)
    signatures[:, : 10 * band] = signatures[0, : 10 * band]
    # The first one is like the last of the others alone, the second like all of them.
    signatures[num] = signatures[num - 1]
    signatures[num, 10 * band :: band] ^= 1
    signatures[num + 1] = signatures[0]
    contents = np.arange(num + 2, dtype=np.uint64)
    leaks = dict(across(contents, contents, list(signatures), contents >= num, CHECKS))
    assert leaks[num].others == (num - 1,)
    assert leaks[num + 1].others == (0,)


def test_the_estimate_of_similarity_is_near_the_truth() -> None:
    for number in (1, 3):
        texts = [duplicates.normalised(text).encode() for text in (prose(3, 400), changed(prose(3, 400), number * 12))]
        first, second = duplicates.signatures(texts)
        assert first is not None
        assert second is not None
        sets = [{data[i : i + 16] for i in range(len(data) - 15)} for data in texts]
        truth = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert (first == second).mean() == pytest.approx(truth, abs=0.12)


def test_a_signature_does_not_depend_on_the_texts_beside_it() -> None:
    texts = [b"short", prose(0).encode(), prose(1).encode(), b"x" * 79, b"", prose(2, 500).encode()]
    together = duplicates.signatures(texts)
    assert [one is None for one in together] == [True, False, False, False, True, False]
    for text, one in zip(texts, together, strict=True):
        (alone,) = duplicates.signatures([text])
        assert (alone is None) == (one is None)
        assert alone is None or (alone == one).all()
    assert duplicates.signatures([]) == []


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_pairs_above_the_threshold_are_found(threshold: float) -> None:
    numbers = np.random.default_rng(0)
    signatures = numbers.integers(0, 2**16, (400, duplicates.NUM_SLOTS), dtype=np.uint16)
    equal = int(np.ceil(threshold * duplicates.NUM_SLOTS))
    for i in range(0, 200, 2):
        same = numbers.permutation(duplicates.NUM_SLOTS)[:equal]
        signatures[i + 1] = numbers.integers(0, 2**16, duplicates.NUM_SLOTS)
        signatures[i + 1, same] = signatures[i, same]
    pairs = {
        (int(min(a, b)), int(max(a, b)))
        for left, right, similarity in duplicates.near_pairs(signatures, threshold)
        for a, b, alike in zip(left, right, similarity, strict=True)
        if alike >= threshold
    }
    assert pairs <= {(i, i + 1) for i in range(0, 200, 2)}
    assert len(pairs) >= 95


def corpus(num: int, sources: list[int] | None = None, held_out: tuple[int, ...] = (), texts: tuple[int, ...] = ()) -> Corpus:
    marks = np.zeros((2, num), dtype=bool)
    marks[0, list(held_out)] = True
    marks[1, list(texts)] = True
    source = np.asarray(sources or [0] * num)
    wheres = [f"{'ab'[s]}.jsonl:{i + 1}" for i, s in enumerate(source.tolist())]
    return Corpus(wheres, source, ("a", "b"), marks[0], np.full(num, 100), marks[1], np.ones(num, dtype=bool))


def by_name(found: findings.Findings) -> dict[str, findings.Finding]:
    return {finding.name: finding for finding in found}


def test_findings_have_counts_sources_and_three_places() -> None:
    hits = [(i, Hit("secrets", f"detail {i}")) for i in range(0, 200, 2)]
    drop, found = conclude(hits, corpus(200, [0] * 100 + [1] * 100), CHECKS)
    (finding,) = found
    assert (finding.name, finding.count, finding.total, finding.share) == ("secrets", 100, 200, 0.5)
    assert finding.sources == {"a": 50, "b": 50}
    assert [example.where for example in finding.examples] == ["a.jsonl:1", "b.jsonl:101", "b.jsonl:199"]
    assert [example.detail for example in finding.examples] == ["detail 0", "detail 100", "detail 198"]
    assert not drop.any()


def test_drop_takes_the_document_or_what_stands_in_training() -> None:
    hits = [
        (3, Hit("exact_duplicate", "the same as", (1,))),
        (5, Hit("held_out_in_train", "the same as", (2, 4))),
        (5, Hit("near_held_out_in_train", "90% the same as", (8,))),
        (6, Hit("secrets", "x")),
        (7, Hit("empty_answer", "x")),
    ]
    everything = corpus(200, held_out=(5,))
    for settings, dropped in (
        ({}, [7]),
        ({"exact_duplicate": "drop"}, [3, 7]),
        ({"held_out_in_train": "drop", "empty_answer": "keep"}, [2, 4]),
        ({"near_held_out_in_train": "drop"}, [7, 8]),
        ({"secrets": "drop", "empty_answer": "fail"}, [6]),
    ):
        drop, found = conclude(hits, everything, ChecksSection.model_validate(settings))
        assert np.flatnonzero(drop).tolist() == dropped
        assert by_name(found)["held_out_in_train"].total == 1
        assert by_name(found)["near_held_out_in_train"].total == 1
        assert by_name(found)["held_out_in_train"].examples[0].detail == "the same as a.jsonl:3 and 1 more"


def test_a_near_duplicate_of_what_is_dropped_stays() -> None:
    hits = [(i, Hit("near_duplicate", "90% the same as", (first,))) for i, first in ((3, 1), (4, 1), (5, 3), (6, 2))]
    checks = ChecksSection(near_duplicate="drop", secrets="drop")
    drop, found = conclude([*hits, (1, Hit("secrets", "x"))], corpus(200), checks)
    assert np.flatnonzero(drop).tolist() == [1, 4, 5, 6]
    assert by_name(found)["near_duplicate"].count == 4


def test_documents_without_end_of_turn_refuse_a_run_above_half_of_a_source() -> None:
    everything = corpus(200, [0] * 100 + [1] * 100)
    everything.trained[90:100] = False
    for num, fatal in ((1, False), (45, False), (46, True)):
        finding = by_name(conclude([(i, Hit("no_turn_end", "x")) for i in range(num)], everything, CHECKS)[1])["no_turn_end"]
        assert (finding.count, finding.total, finding.sources) == (num, 190, {"a": num})
        assert finding.highest_share == num / 90
        (judged,) = findings.judge((finding,), CHECKS)
        assert judged.fatal is fatal


def test_few_examples_say_what_is_usual() -> None:
    dropped = [(i, Hit("empty_answer", "x")) for i in range(30)]
    assert "few_examples" not in by_name(conclude([], corpus(100), CHECKS)[1])
    (few,) = [f for f in conclude(dropped, corpus(120), CHECKS)[1] if f.name == "few_examples"]
    assert few.count == 90
    assert "50 to 100 are usual" in few.examples[0].detail
    (few,) = conclude([], corpus(500, texts=tuple(range(500))), CHECKS)[1]
    assert few.examples[0].detail.startswith("50,000 tokens of text")
    assert conclude([], corpus(500, texts=tuple(range(300))), CHECKS)[1] == ()
    assert conclude([], corpus(50), ChecksSection(few_examples_below=50))[1] == ()


def test_a_check_for_every_title_and_a_title_for_every_finding() -> None:
    checks = ChecksSection.model_fields
    assert (
        set(findings.TITLES)
        == set(findings.REMEDIES)
        == {name for name in checks if checks[name].default in ("keep", "drop", "fail")}
    )
