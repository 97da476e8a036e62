"""The held-out split shares no prompts with training, and prompts in both are a finding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.data import cache_store, row_layout
from launcher.data.build import build
from launcher.data.checks import findings
from launcher.data.corpus import EncodedCorpus, read_corpus

Jsonl = Callable[..., Path]


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def find(facts: Any) -> dict[str, findings.Finding]:
    return {finding.name: finding for finding in findings.read(facts.cache_dir)}


@pytest.fixture
def read(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., EncodedCorpus]:
    def read_rows(rows: Path, **settings: Any) -> EncodedCorpus:
        data = DataSection(sources=(Source(path=str(rows)),), max_length=64, workers=1, **settings)
        return read_corpus(data, str(tokenizer_dir), row_layout.TokenSpool(tmp_path), lambda stage, done, total: None)

    return read_rows


def test_all_answers_to_a_prompt_are_in_one_split(jsonl: Jsonl, read: Callable[..., EncodedCorpus]) -> None:
    rows = [row(f"Name a number above {i}{' ' * n}", f"{i + n + 1}") for i in range(60) for n in range(4)]
    path = jsonl(rows)
    held_out = read(path, eval_fraction=0.2).docs.held_out.reshape(60, 4)
    assert (held_out == held_out[:, :1]).all()
    assert 0.05 < held_out.mean() < 0.4


def test_documents_of_a_very_common_prompt_are_divided_one_by_one(jsonl: Jsonl, read: Callable[..., EncodedCorpus]) -> None:
    rows = [row("Write a sentence.", f"Sentence {i} of many.") for i in range(300)]
    corpus = read(jsonl(rows), eval_fraction=0.1)
    assert 0.03 < corpus.docs.held_out.mean() < 0.2
    assert corpus.prompts
    assert all(corpus.docs.held_out[prompt.doc] for prompt in corpus.prompts)


def test_texts_without_a_prompt_are_divided_by_their_content(jsonl: Jsonl, read: Callable[..., EncodedCorpus]) -> None:
    corpus = read(jsonl([{"text": f"Text number {i}"} for i in range(200)]), eval_fraction=0.2)
    assert 0.1 < corpus.docs.held_out.mean() < 0.3
    assert not corpus.docs.prompts.any()


def test_prompts_with_other_answers_in_training_are_a_finding(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    train = jsonl([row(f"How many apples does person {i} have?", f"There are {i}.") for i in range(40)], "train.jsonl")
    held_out = jsonl(
        [
            row("How many apples does person 3 have?", "I do not know"),
            row("\u200bHow  many apples, does person 4 have\uff1f", "I do not know that either"),
            row("How many apples does person 5 have?", "There are 5"),
            row("How many apples does person 77 have?", "Seven"),
            row("What is the capital of France?", "Paris"),
        ],
        "held_out.jsonl",
    )
    data = DataSection(sources=(Source(path=str(train)),), eval_path=str(held_out), max_length=64)
    found = find(build(data, str(tokenizer_dir)))
    counts = {name: (found[name].count, found[name].total) for name in findings.OF_HELD_OUT if name in found}
    assert counts == {"held_out_in_train": (1, 5), "held_out_prompt_in_train": (2, 5), "similar_prompt_in_train": (1, 5)}
    assert found["held_out_prompt_in_train"].examples[0].detail == f"the prompt of {train}:4"
    dropping = data.model_copy(update={"checks": ChecksSection(held_out_prompt_in_train="drop", held_out_in_train="drop")})
    facts = build(dropping, str(tokenizer_dir))
    assert (facts.num_docs, cache_store.read_report(facts.cache_dir)["dropped_docs"]) == (37, 3)
    refusing = ChecksSection(held_out_prompt_in_train="fail", held_out_in_train="keep")
    (problem,) = findings.problems(tuple(found.values()), refusing)
    assert "whose prompt is also in the training split" in problem.message


@pytest.mark.parametrize(
    ("share", "setting", "expected"),
    [(0.3, {}, {"truncated"}), (0.3, {"truncated": "keep"}, set()), (0.1, {}, set())],
)
def test_many_documents_that_are_cut_off_refuse_the_run(
    jsonl: Jsonl, tokenizer_dir: Path, share: float, setting: dict[str, Any], expected: set[str]
) -> None:
    rows = [row(f"Say {i}", f"word{i} " * (100 if i < 100 * share else 2)) for i in range(100)]
    data = DataSection(sources=(Source(path=str(jsonl(rows))),), max_length=64, checks=ChecksSection(**setting))
    all_findings = findings.read(build(data, str(tokenizer_dir)).cache_dir)
    fatal = {one.finding.name for one in findings.judge(all_findings, data.checks) if one.fatal}
    assert fatal == expected
    truncated = {one.name: one for one in all_findings}["truncated"]
    assert (truncated.count, truncated.total) == (round(100 * share), 100)
    assert "tokens are cut off" in truncated.examples[0].detail


def test_many_documents_that_are_left_out_refuse_the_run(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    answers = ["word " * 100] * 20 + [" "] * 20 + ["the same"] * 20
    rows = [row(f"Say {i if answer != 'the same' else 0}", answer) for i, answer in enumerate(answers)]
    rows += [row(f"And {i}", f"{i}") for i in range(40)]
    checks = ChecksSection(exact_duplicate="drop")
    data = DataSection(sources=(Source(path=str(jsonl(rows))),), max_length=64, long_documents="drop", checks=checks)
    facts = build(data, str(tokenizer_dir))
    (problem,) = findings.problems(findings.read(facts.cache_dir), data.checks)
    assert problem.message.startswith("40 of 100 (40.0%): documents that are left out.")
    assert "dropped by the check empty_answer" in problem.value
    assert "tokens, more than a row has" in problem.value
    assert not findings.problems(findings.read(facts.cache_dir), ChecksSection(dropped="keep"))
