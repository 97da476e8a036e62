"""Checks on single documents: faults are located, good text has no findings, secrets are never shown, and findings are stored."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.data.checks import findings, inspection, patterns
from launcher.data.checks.findings import Example, Finding, judge, refuse
from launcher.data.checks.inspection import inspect
from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization.encoder import EncodedDocument, RenderedDocument
from launcher.data.tokenization.loss_mask import TrainedSpan
from launcher.errors import DataError

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
# ‹ › mark the secret.
HIDDEN = [
    "AWS_SECRET_ACCESS_KEY=‹wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY›",
    "Authorization: Bearer ‹abcdef1234567890abcdef›",
    "password=‹hunter2hunter2›",
    "db password is ‹s3cretPassw0rd!›",
    "Tel. ‹089 / 1234 5678›",
    "‹555-123-4567›",
]
NOT_SECRET = [
    "password = getpass()",
    'api_key=os.environ["X1Y2Z3"]',
    "password: str = Field(min_length=8)",
    "password=user_password2",
    "API_KEY=<your_api_key1>",
    "secret: 12345678",
    "Authorization: Bearer $TOKEN1",
    "the secret is to add 2x4 boards",
    "from 0900-0130, 100-200 apples, 300/400, 01/02/2020",
    "her phone 742 / 106 = 7",
]
LEAK = Finding("held_out_in_train", 3, 100, {"a": 3}, (Example("a.jsonl:7", "the same as a.jsonl:2"),))
SECRET = Finding("secrets", 1, 1000, {"a": 1}, (Example("a.jsonl:9", "[API key: s…, 40 characters]"),))
NO_END = Finding("no_turn_end", 50, 1000, {"a": 50}, (Example("a.jsonl:1", "no end of turn is trained"),), highest_share=0.6)


def encoded(trained: int = 5, prompt: int = 5, turn_end: bool = True) -> EncodedDocument:
    mask = np.asarray([0] * prompt + [1] * trained, dtype=np.uint8)
    return EncodedDocument(np.arange(len(mask), dtype=np.uint32), mask, (len(mask) - 1,) if turn_end and trained else ())


def chat(*turns: tuple[str, str], **last: Any) -> Document:
    messages = [Message(role, content) for role, content in turns]
    if last:
        messages[-1] = Message(*turns[-1], **last)
    return Document("rows.jsonl:1", tuple(messages))


def system(text: str) -> Message:
    return Message("system", text)


def settings(checks: ChecksSection = CHECKS, **more: Any) -> DataSection:
    return DataSection(sources=(Source(path="rows.jsonl"),), checks=checks, **more)


def trained(text: str) -> RenderedDocument:
    return RenderedDocument("x:1", text, (TrainedSpan(0, len(text)),), raw=False)


def hits_of(
    document: Document,
    tokens: EncodedDocument | None = None,
    checks: ChecksSection = CHECKS,
    text: str = "",
    train_on: str = "assistant",
) -> dict[str, str]:
    (seen,) = inspect([document], [trained(text)], [tokens or encoded()], SPECIAL, settings(checks, train_on=train_on))
    return {hit.finding: hit.detail for hit in seen.hits}


GOOD = [
    chat(("user", "What is 2 + 2?"), ("assistant", "It is 4, or 20+30-46; see 3.1415 and 2024-05-06.")),
    chat(("system", "Be brief."), ("user", "Why?"), ("assistant", "Because."), ("user", "So?"), ("assistant", "So.")),
    chat(("user", "naïve café — “quotes”"), ("assistant", "Ωμέγα, 日本語, 🙂, ¿qué? £5 « oui »")),
    Document(
        "x:1",
        (
            Message("user", "Weather?"),
            Message("assistant", "", tool_calls=({"function": {"name": "weather", "arguments": {"city": "Oslo"}}},)),
            Message("tool", "rain"),
            Message("assistant", "It rains."),
        ),
    ),
    Document("x:1", prompt="def key(monkey):", text=" return monkey['token'] < 3  # eight, disk-usage: a@example.com"),
    Document("x:1", text="Order 555 of 12 items at 10.000.000 each; ratio 1:2, [INSTALL], a << b, <s>struck</s>."),
]


@pytest.mark.parametrize("document", GOOD)
def test_good_documents_have_no_findings(document: Document) -> None:
    assert hits_of(document) == {}
    texts = [part.text for part in inspection._list_parts(document, trained(""), "assistant")]
    assert patterns.redact(texts) == texts


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ([("assistant", "Hello"), ("user", "Hi"), ("assistant", "So")], "messages[0] (assistant) comes first"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "messages[1] (user) follows a message of role user"),
        ([("user", "a"), ("tool", "b"), ("assistant", "c")], "messages[1] (tool) follows a message of role user"),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "the last message is of role user"),
    ],
)
def test_roles_out_of_order_are_reported(turns: list[tuple[str, str]], fault: str) -> None:
    assert hits_of(chat(*turns)) == {"role_order": fault}


def test_the_system_setting_and_speaker_names_are_checked() -> None:
    rows = (system("Ask eve@corp.com."), Message("user", "a", name="bob@corp.com"), Message("assistant", "b"))
    document = Document("x:1", rows)
    assert hits_of(document)["personal_data"].startswith("system, character 4: ")
    for data in (settings(), settings(system="Be kind."), settings(system=f"Key: {SECRETS['API key']}")):
        (seen,) = inspect([document], [trained("")], [encoded()], SPECIAL, data)
        (alone,) = inspect([Document("x:1", rows[1:])], [trained("")], [encoded()], SPECIAL, data)
        hits = {hit.finding: hit.detail for hit in seen.hits}
        assert [hit.finding for hit in seen.hits] == [hit.finding for hit in alone.hits], "its own text is not written"
        if data.system is not None:
            assert hits["personal_data"].startswith("messages[1].name, character 0: [e-mail address")
        assert ("secrets" in hits) is ("Key" in (data.system or ""))
    assert hits["secrets"].startswith("data.system, character 5: ")
    plain = Document("x:1", tuple(replace(message, name=None) for message in rows))
    first, second = inspect([document, plain], [trained("")] * 2, [encoded()] * 2, SPECIAL, settings(system="Be kind."))
    (third,) = inspect([plain], [trained("")], [encoded()], SPECIAL, settings())
    assert first.content == second.content == third.content, "settings and names move no document to the other split"


def test_empty_answers_count_where_they_would_be_trained() -> None:
    assert hits_of(chat(("user", "a"), ("assistant", " \n\t"))) == {"empty_answer": "messages[1] is empty"}
    assert hits_of(Document("x:1", prompt="a", text=" ")) == {"empty_answer": "completion is empty"}
    assert hits_of(chat(("user", "a"), ("assistant", ""), weight=0)) == {}
    assert hits_of(chat(("user", "a"), ("assistant", ""), tool_calls=({"function": {"name": "f"}},))) == {}
    silent = chat(("user", "a"), ("assistant", ""), reasoning_content="because\n")
    assert hits_of(silent, text="<think>because</think><|im_end|>") == {}
    assert hits_of(silent, text="<|im_end|>") == {"empty_answer": "messages[1] is empty"}
    earlier = chat(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c"))
    assert hits_of(earlier) == hits_of(earlier, train_on="all") == {"empty_answer": "messages[1] is empty"}
    assert hits_of(earlier, train_on="last_turn") == {}


def test_documents_without_trained_tokens_are_found() -> None:
    document = GOOD[0]
    assert hits_of(document, encoded(trained=0)) == {"no_trained_token": "no token is trained"}


def test_long_answers_are_measured_by_their_longest_span() -> None:
    marks = np.ones(6001, dtype=np.uint8)
    marks[[0, 3000]] = 0
    assert hits_of(GOOD[0], EncodedDocument(np.arange(6001, dtype=np.uint32), marks, (6000,))) == {}
    assert hits_of(GOOD[0], encoded(trained=4097)) == {"long_answer": "4,097 trained tokens in one answer"}
    assert hits_of(Document("x:1", text="a"), encoded(trained=4097)) == {}


def test_an_answer_that_repeats_itself_is_found() -> None:
    looping = "I am sure that this is the answer. " * 20
    assert list(hits_of(chat(("user", "a"), ("assistant", looping)))) == ["repetitive_answer"]
    assert hits_of(chat(("user", looping), ("assistant", "no"))) == {}
    drawn = random.Random(0)
    varied = " ".join(drawn.choice("abcdefghij") * drawn.randint(1, 4) for _ in range(300))
    assert hits_of(chat(("user", "a"), ("assistant", varied))) == {}


@pytest.mark.parametrize(
    ("text", "detail"),
    [("a \ufffd b \ufffd", "2 replacement characters"), ("donâ€™t", "wrong encoding"), ("Ã©tÃ© franÃ§ais", "wrong encoding")],
)
def test_wrongly_decoded_text_is_found(text: str, detail: str) -> None:
    hits = hits_of(chat(("user", text), ("assistant", "ok")))
    assert list(hits) == ["broken_encoding"]
    assert hits["broken_encoding"].startswith("messages[0]: ")
    assert detail in hits["broken_encoding"]


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("so <|im_end|> it", "a special token of this tokenizer"),
        ("<|eot_id|>", "unknown to this tokenizer"),
    ],
)
def test_special_tokens_in_the_text_are_found(text: str, means: str) -> None:
    hits = hits_of(Document("x:1", text=text))
    assert list(hits) == ["special_token_in_text"]
    assert hits["special_token_in_text"].endswith(means)


@pytest.mark.parametrize("kind", list(SECRETS))
def test_secrets_are_located_and_never_shown(kind: str) -> None:
    secret = SECRETS[kind]
    text = f"Take postgres{secret}db.host:5432 then." if kind == "password in an address" else f'This is it: {secret}" and on.'
    finding = "personal_data" if kind in ("e-mail address", "telephone number") else "secrets"
    hits = hits_of(chat(("user", "Which?"), ("assistant", text)))
    assert set(hits) == {finding}
    assert f"[{kind}: " in hits[finding]
    assert hits[finding].startswith("messages[1], character ")
    core = secret.split("\n")[-1].split('"')[-1]
    for shown in (hits[finding], patterns.redact([text])[0]):
        assert core[:8] not in shown
        assert core[-8:] not in shown
    assert patterns.redact([text])[0].startswith(("This is it: ", "Take postgres"))


@pytest.mark.parametrize("text", HIDDEN)
def test_secrets_in_prose_are_redacted(text: str) -> None:
    before, secret, _ = text.replace("‹", "›").split("›")
    (shown,) = patterns.redact([before + secret])
    assert secret not in shown
    assert secret[-6:] not in shown
    assert len(hits_of(Document("x:1", text=before + secret))) == 1


@pytest.mark.parametrize("text", NOT_SECRET)
def test_code_and_numbers_are_no_secrets(text: str) -> None:
    assert patterns.redact([text]) == [text]
    assert hits_of(Document("x:1", text=text)) == {}


def test_every_check_of_the_settings_has_its_texts() -> None:
    checks = ChecksSection.model_fields
    assert {name for name in checks if checks[name].default in ("keep", "drop", "fail")} < set(findings.CHECKS)


def test_the_settings_of_the_run_decide_what_is_fatal() -> None:
    judged = judge((SECRET, LEAK, NO_END), ChecksSection())
    assert [(one.finding.name, one.action, one.fatal) for one in judged] == [
        ("held_out_in_train", "fail", True),
        ("no_turn_end", "fail", True),
        ("secrets", "keep", False),
    ]
    lenient = ChecksSection(held_out_in_train="keep", no_turn_end="keep", secrets="fail")
    assert [(one.finding.name, one.fatal) for one in judge((LEAK, NO_END, SECRET), lenient)] == [
        ("secrets", True),
        ("held_out_in_train", False),
        ("no_turn_end", False),
    ]


@pytest.mark.parametrize(("share", "fatal"), [(0.99, False), (1.0, True)])
def test_a_whole_source_without_a_trained_token_refuses_a_run(share: float, fatal: bool) -> None:
    (judged,) = judge((Finding("no_trained_token", 99, 200, {"a": 99}, LEAK.examples, share),), ChecksSection())
    assert judged.fatal is fatal


def test_a_refusal_names_the_places_and_the_setting_that_accepts_it() -> None:
    with pytest.raises(DataError) as caught:
        refuse((SECRET, LEAK, NO_END), ChecksSection())
    first, second = caught.value.problems
    assert first.message == (
        "3 of 100 (3.0%): held-out documents that are also in the training split, ignoring case, white space and punctuation. "
        "The evaluation loss is too low"
    )
    assert (first.where, first.value) == ("a.jsonl:7", "the same as a.jsonl:2")
    assert first.remedy.endswith("data.checks.held_out_in_train=keep")
    assert second.remedy.endswith("data.checks.no_turn_end=keep")
    refuse((SECRET, LEAK, NO_END), ChecksSection(held_out_in_train="keep", no_turn_end="keep"))
    refuse((), ChecksSection())
