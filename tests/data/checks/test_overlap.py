"""Duplicates and leaks between documents, and which documents are dropped or reported."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import pytest

from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.data.checks import findings, overlap
from launcher.data.checks.findings import CheckHit
from launcher.data.checks.inspection import Inspection, inspect
from launcher.data.corpus import collect_findings, select_dropped
from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization.batch_encoder import DocumentTable
from launcher.data.tokenization.encoder import EncodedDocument, RenderedDocument

CHECKS = ChecksSection()


def inspected(documents: Sequence[Document], checks: ChecksSection = CHECKS) -> list[Inspection]:
    tokens = EncodedDocument(np.arange(4, dtype=np.uint32), np.asarray([0, 1, 1, 1], dtype=np.uint8), (3,))
    data, texts = DataSection(sources=(Source(path="rows.jsonl"),), checks=checks), [RenderedDocument("x:1", "", (), raw=False)]
    return inspect(documents, texts * len(documents), [tokens] * len(documents), (), data)


def across(
    contents: np.ndarray, tasks: np.ndarray, signatures: list[np.ndarray | None], held_out: np.ndarray, checks: ChecksSection
) -> list[tuple[int, CheckHit]]:
    """Return all duplicates and leaks, assuming that all training documents are in the rows."""
    training, inside = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    return [
        *overlap.find_duplicates(contents, tasks, signatures, training),
        *overlap.find_leaks(contents, training, inside),
        *overlap.find_near_leaks(contents, signatures, training, inside, checks.near_held_out_in_train == "drop"),
    ]


def conclude(
    hits: list[tuple[int, CheckHit]], docs: DocumentTable, checks: ChecksSection, untrained: slice = slice(0)
) -> tuple[np.ndarray, findings.Findings]:
    """Return the dropped documents and the findings, assuming that all other documents are in the rows."""
    drop = select_dropped(hits, len(docs.wheres), checks)
    trained = np.ones(len(drop), dtype=bool)
    trained[untrained] = False
    return drop, collect_findings(hits, docs, ("a", "b"), trained, used=~drop & ~docs.held_out)


@dataclass
class Collection:
    """Collects documents as the builder does."""

    texts: list[str] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)

    def add(self, text: str, held_out: bool = False) -> int:
        self.texts.append(text)
        self.held_out.append(held_out)
        return len(self.texts) - 1

    def across(self, checks: ChecksSection = CHECKS) -> list[tuple[int, CheckHit]]:
        seen = inspected([Document("x", text=text) for text in self.texts], checks)
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
    same = [Document("x:1", turns), Document("x:2", (Message("user", "A "), turns[1]))]
    others = [Document("x:3", turns, (tool,)), Document("x:4", weightless), Document("x:5", (Message("system", "a"), turns[1]))]
    rows = [*same, *others]
    seen = inspected(rows)
    assert len({one.content for one in seen}) == 1
    assert [one.task == seen[0].task for one in seen] == [True, True, False, False, False]
    contents, tasks = np.asarray([(one.content, one.task) for one in seen], dtype=np.uint64).T
    hits = across(contents, tasks, [None] * 5, np.asarray([False] * 5), CHECKS)
    assert hits == [(1, CheckHit("exact_duplicate", "the same as", (0,)))]
    # A held-out document is a leak even if its tools differ.
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


def test_a_leak_is_found_among_thousands_of_candidates_in_a_band() -> None:
    numbers = np.random.default_rng(0)
    num = 5 * overlap.REACH_ACROSS
    signatures = numbers.integers(0, 2**16, (num + 2, overlap.NUM_SLOTS), dtype=np.uint16)
    band = overlap.ROWS_PER_BAND
    signatures[:, : 10 * band] = signatures[0, : 10 * band]
    # The first held-out document resembles only the last training document, the second resembles all.
    signatures[num] = signatures[num - 1]
    signatures[num, 10 * band :: band] ^= 1
    signatures[num + 1] = signatures[0]
    contents = np.arange(num + 2, dtype=np.uint64)
    leaks = dict(across(contents, contents, list(signatures), contents >= num, CHECKS))
    assert leaks[num].others == (num - 1,)
    assert leaks[num + 1].others == (0,)


def alike_in_one_band(num: int, held_out: int) -> np.ndarray:
    """Return signatures of `num` training and `held_out` held-out documents that differ in a single slot."""
    signatures = np.zeros((num + held_out, overlap.NUM_SLOTS), dtype=np.uint16)
    signatures[:, 0] = np.arange(num + held_out)
    return signatures


def test_every_near_copy_is_dropped_from_training_however_many_there_are() -> None:
    num = 3 * overlap.REACH_ACROSS
    signatures, contents = list(alike_in_one_band(num, 2)), np.arange(num + 2, dtype=np.uint64)
    for action, complete in (("keep", False), ("drop", True)):
        checks = ChecksSection(near_held_out_in_train=action)
        hits = [(i, hit) for i, hit in across(contents, contents, signatures, contents >= num, checks) if i >= num]
        assert [i for i, _ in hits] == [num, num + 1]
        assert ({other for _, hit in hits for other in hit.others} == set(range(num))) is complete
        drop, _ = conclude(hits, corpus(num + 2, held_out=(num, num + 1)), checks)
        assert np.flatnonzero(drop).tolist() == (list(range(num)) if complete else [])


def test_documents_that_were_not_compared_are_reported_if_no_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MAX_PAIRS_ACROSS", 10)
    signatures, contents = list(alike_in_one_band(100, 1)), np.arange(101, dtype=np.uint64)
    hits = across(contents, contents, signatures, contents >= 100, CHECKS)
    assert [(i, hit.finding) for i, hit in hits if i == 100] == [(100, "not_compared")]


def test_pairs_above_the_threshold_are_found() -> None:
    numbers = np.random.default_rng(0)
    signatures = numbers.integers(0, 2**16, (400, overlap.NUM_SLOTS), dtype=np.uint16)
    equal = int(np.ceil(overlap.THRESHOLD * overlap.NUM_SLOTS))
    for i in range(0, 200, 2):
        same = numbers.permutation(overlap.NUM_SLOTS)[:equal]
        signatures[i + 1] = numbers.integers(0, 2**16, overlap.NUM_SLOTS)
        signatures[i + 1, same] = signatures[i, same]
    pairs = {
        (int(min(a, b)), int(max(a, b)))
        for left, right, similarity in overlap.find_near_pairs(signatures)
        for a, b, alike in zip(left, right, similarity, strict=True)
        if alike >= overlap.THRESHOLD
    }
    assert pairs <= {(i, i + 1) for i in range(0, 200, 2)}
    assert len(pairs) >= 95


def corpus(
    num: int, sources: list[int] | None = None, held_out: tuple[int, ...] = (), texts: tuple[int, ...] = ()
) -> DocumentTable:
    marks = np.zeros((2, num), dtype=bool)
    marks[0, list(held_out)] = True
    marks[1, list(texts)] = True
    source = np.asarray(sources or [0] * num)
    wheres = [f"{'ab'[s]}.jsonl:{i + 1}" for i, s in enumerate(source.tolist())]
    given = {"wheres": wheres, "source": source, "held_out": marks[0], "num_tokens": np.full(num, 100), "is_text": marks[1]}
    return DocumentTable(**{column.name: given.get(column.name) for column in fields(DocumentTable)})  # type: ignore[arg-type]


def by_name(all_findings: findings.Findings) -> dict[str, findings.Finding]:
    return {finding.name: finding for finding in all_findings}


def test_findings_have_counts_sources_and_three_examples() -> None:
    hits = [(i, CheckHit("secrets", f"detail {i}")) for i in range(0, 200, 2)]
    drop, all_findings = conclude(hits, corpus(200, [0] * 100 + [1] * 100), CHECKS)
    (finding,) = all_findings
    assert (finding.name, finding.count, finding.total, finding.share) == ("secrets", 100, 200, 0.5)
    assert finding.sources == {"a": 50, "b": 50}
    assert [example.where for example in finding.examples] == ["a.jsonl:1", "b.jsonl:101", "b.jsonl:199"]
    assert [example.detail for example in finding.examples] == ["detail 0", "detail 100", "detail 198"]
    assert not drop.any()


def test_drop_removes_the_document_or_its_copies_in_training() -> None:
    hits = [
        (3, CheckHit("exact_duplicate", "the same as", (1,))),
        (5, CheckHit("held_out_in_train", "the same as", (2, 4))),
        (5, CheckHit("near_held_out_in_train", "90% the same as", (8,))),
        (6, CheckHit("secrets", "x")),
        (7, CheckHit("empty_answer", "x")),
    ]
    everything = corpus(200, held_out=(5,))
    for settings, gone in (
        ({}, [7]),
        ({"exact_duplicate": "drop"}, [3, 7]),
        ({"held_out_in_train": "drop", "empty_answer": "keep"}, [2, 4]),
        ({"near_held_out_in_train": "drop"}, [7, 8]),
        ({"secrets": "drop", "empty_answer": "fail"}, [6]),
    ):
        drop, all_findings = conclude(hits, everything, ChecksSection.model_validate(settings))
        assert np.flatnonzero(drop).tolist() == gone
        assert by_name(all_findings)["held_out_in_train"].total == 1
        assert by_name(all_findings)["near_held_out_in_train"].total == 1
        assert by_name(all_findings)["held_out_in_train"].examples[0].detail == "the same as a.jsonl:3 and 1 more"


def test_a_near_duplicate_of_a_dropped_document_is_kept() -> None:
    hits = [(i, CheckHit("near_duplicate", "90% the same as", (first,))) for i, first in ((3, 1), (4, 1), (5, 3), (6, 2))]
    checks = ChecksSection(near_duplicate="drop", secrets="drop")
    drop, all_findings = conclude([*hits, (1, CheckHit("secrets", "x"))], corpus(200), checks)
    assert np.flatnonzero(drop).tolist() == [1, 4, 5, 6]
    assert by_name(all_findings)["near_duplicate"].count == 4


def test_documents_without_end_of_turn_refuse_a_run_above_half_of_a_source() -> None:
    everything = corpus(200, [0] * 100 + [1] * 100)
    for num, fatal in ((1, False), (45, False), (46, True)):
        hits = [(i, CheckHit("no_turn_end", "x")) for i in range(num)]
        finding = by_name(conclude(hits, everything, CHECKS, untrained=slice(90, 100))[1])["no_turn_end"]
        assert (finding.count, finding.total, finding.sources) == (num, 190, {"a": num})
        assert finding.highest_share == num / 90
        (judged,) = findings.judge((finding,), CHECKS)
        assert judged.fatal is fatal


def test_few_examples_name_the_usual_number() -> None:
    dropped = [(i, CheckHit("empty_answer", "x")) for i in range(30)]
    assert "few_examples" not in by_name(conclude([], corpus(100), CHECKS)[1])
    (few,) = [f for f in conclude(dropped, corpus(120), CHECKS)[1] if f.name == "few_examples"]
    assert few.count == 90
    assert "50 to 100 are usual" in few.examples[0].detail
    (few,) = conclude([], corpus(500, texts=tuple(range(500))), CHECKS)[1]
    assert few.examples[0].detail.startswith("50,000 tokens of text")
    assert conclude([], corpus(500, texts=tuple(range(300))), CHECKS)[1] == ()


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("3 + 4 =", "3+4="),
        ("It\u2019s  here \u2014 now!", "it's here, now"),
        ("\uff37hat\u200b is\u00ad this\ufeff?", "What is this"),
    ],
)
def test_texts_that_a_reader_takes_for_the_same_are_compared_as_the_same(text: str, same: str) -> None:
    assert overlap.make_comparable(overlap.normalize(text)) == overlap.make_comparable(overlap.normalize(same))


@pytest.mark.parametrize(
    ("text", "other"),
    [("1.5", "15"), ("3 + 4", "34"), ("2*(3+4)", "2*3+4"), ("caf\u00e9", "cafe")],
)
def test_texts_of_other_meaning_are_not_compared_as_the_same(text: str, other: str) -> None:
    assert overlap.make_comparable(overlap.normalize(text)) != overlap.make_comparable(overlap.normalize(other))
