"""Answers without their prompts, document origins, the ranking of documents, and excluding documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launcher.cli.explain import show_ranking
from launcher.cli.render.terminal import to_lines
from launcher.config.sections.data import DataSection, Source
from launcher.data import triage
from launcher.data.build import build
from launcher.data.cache_store import cache_key, read_report
from launcher.data.split import DocumentOrigins, Split
from launcher.data.triage import MEMORIZED, MISLABELED, NOTHING_TO_LEARN, write_exclusions
from launcher.errors import DataError

Jsonl = Callable[..., Path]


def chats(jsonl: Jsonl, num_rows: int = 40, **settings: object) -> DataSection:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i} " * (1 + i % 5)},
                {"role": "assistant", "content": f"Answer {i}."},
            ]
        }
        for i in range(num_rows)
    ]
    source = Source(name="chats", path=str(jsonl(rows, "chats.jsonl")))
    return DataSection(sources=(source,), max_length=256, workers=1, **settings)


def text_of(split: Split, document: int) -> list[int]:
    return split.tokens[int(split.docs[document]) : int(split.docs[document + 1])].tolist()


def trained_tokens(split: Split, document: int) -> list[int]:
    span = slice(int(split.docs[document]), int(split.docs[document + 1]))
    return split.tokens[span][split.trained[span].astype(bool)].tolist()


def test_every_document_has_its_file_and_line(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    data = chats(jsonl, eval_fraction=0.3)
    facts = build(data, str(tokenizer_dir))
    lines = []
    for held_out in (False, True):
        split, origins = Split.open(facts, held_out), DocumentOrigins.open(facts.cache_dir, held_out)
        assert len(origins.values) == split.num_docs
        for document in range(split.num_docs):
            path, _, line = origins.where(document).rpartition(":")
            assert path == data.sources[0].path
            lines.append(int(line))
    assert sorted(lines) == list(range(1, 41))
    origins_file = Path(facts.cache_dir) / "origins.npy"
    content = bytearray(origins_file.read_bytes())
    content[-1] ^= 1
    origins_file.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        DocumentOrigins.open(facts.cache_dir)


@pytest.mark.parametrize("packing", [True, False])
def test_answers_alone_keep_what_all_prompts_end_with(jsonl: Jsonl, tokenizer_dir: Path, tmp_path: Path, packing: bool) -> None:
    data = chats(jsonl, packing=packing)
    split = Split.open(build(data, str(tokenizer_dir)))
    (tmp_path / "alone").mkdir()
    alone = triage.write_answers_alone(split, tmp_path / "alone", data)
    assert alone is not None
    facts, documents = alone
    answers = Split.open(facts)
    assert sorted(documents.tolist()) == list(range(split.num_docs))
    leads = set()
    for number, document in enumerate(documents.tolist()):
        answer = trained_tokens(split, document)
        assert trained_tokens(answers, number) == answer
        assert len(text_of(answers, number)) < len(text_of(split, document))
        leads.add(tuple(text_of(answers, number)[: -len(answer)]))
    # Each answer follows only the template's assistant header, with nothing of the question.
    (lead,) = leads
    assert len(lead) >= 1
    assert answers.columns["num_trained"].sum() == split.columns["num_trained"].sum()


def test_texts_have_no_answers(jsonl: Jsonl, tokenizer_dir: Path, tmp_path: Path) -> None:
    source = Source(path=str(jsonl([{"text": f"text number {i}"} for i in range(5)], "texts.jsonl")))
    data = DataSection(sources=(source,), max_length=64, workers=1)
    assert triage.write_answers_alone(Split.open(build(data, str(tokenizer_dir))), tmp_path, data) is None


def test_documents_are_ranked_by_what_the_prompt_explains() -> None:
    nan = float("nan")
    num_tokens = np.asarray([20, 20, 20, 20, 20, 2])
    loss, loss_alone = np.asarray([3.0, 2.0, 0.05, 0.05, 1.0, 0.0]), np.asarray([4.0, 1.9, 1.0, 0.06, nan, 3.0])
    ranked = triage.rank_documents(num_tokens, loss, loss_alone)
    # Document 0 has the highest loss because its answer is hard to guess. The prompt of document 1 does not help at all.
    assert ranked[MISLABELED].tolist() == [1, 3, 0, 2, 5]
    assert np.flatnonzero(triage.compute_explained_shares(loss, loss_alone) <= 0).tolist() == [1]
    assert ranked[MEMORIZED].tolist() == [2]
    assert ranked[NOTHING_TO_LEARN].tolist() == [3]


def test_mean_losses_are_those_of_each_document(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    split = Split.open(build(chats(jsonl), str(tokenizer_dir)))
    counts = [len(trained_tokens(split, document)) for document in range(split.num_docs)]
    log_probs = -np.repeat(np.arange(split.num_docs, dtype=np.float32), counts)
    num_tokens, losses = triage.compute_mean_losses(split, log_probs)
    assert num_tokens.tolist() == counts
    np.testing.assert_allclose(losses, np.arange(split.num_docs))


def test_excluded_documents_are_not_trained(jsonl: Jsonl, tokenizer_dir: Path, tmp_path: Path) -> None:
    data = chats(jsonl)
    facts = build(data, str(tokenizer_dir))
    origins = DocumentOrigins.open(facts.cache_dir)
    file = tmp_path / "exclude.jsonl"
    gone = {origins.where(document): origins.content_id(document) for document in (3, 17)}
    # The text contains characters at which str.splitlines splits, but reading a file does not.
    write_exclusions(file, [{"content": content, "where": where, "text": "a\u2028b\x85c"} for where, content in gone.items()])
    excluding = data.model_copy(update={"exclude": str(file)})
    without = build(excluding, str(tokenizer_dir))
    left = DocumentOrigins.open(without.cache_dir)
    wheres = {left.where(document) for document in range(len(left.values))}
    assert wheres == {origins.where(document) for document in range(40)} - set(gone)
    assert read_report(without.cache_dir)["num_excluded"] == 2
    key = cache_key(excluding, str(tokenizer_dir))
    file.write_text(file.read_text().split("\n")[0] + "\n")
    assert cache_key(excluding, str(tokenizer_dir)) != key
    assert cache_key(data.model_copy(update={"exclude": None}), str(tokenizer_dir)) == cache_key(data, str(tokenizer_dir))
    file.write_text(json.dumps({"content": "no hash"}) + "\n")
    with pytest.raises(DataError) as refused:
        build(excluding, str(tokenizer_dir))
    assert refused.value.problems[0].where == f"{file}:1"


@pytest.mark.parametrize(("num_likely", "is_cautioned"), [(1, False), (3, True)])
def test_a_model_that_has_not_learned_from_prompts_accuses_no_documents(num_likely: int, is_cautioned: bool) -> None:
    entry = {"document": 1, "where": "rows.jsonl:1", "source": "train", "tokens": 9, "loss": 10.01, "loss_alone": 10.0}
    ranked = [{**entry, "likely": number < num_likely} for number in range(4)]
    lists = {name: ranked if name == MISLABELED else [] for name in triage.FINDINGS}
    counts = {"documents": 4, "split": "train", "trained_tokens": 36, "mean_loss": 10.0}
    lines = to_lines(*show_ranking({"run": "first", "step": 6, "lists": lists, **counts}, 1))
    assert any("the model has hardly learned from prompts yet" in line for line in lines) is is_cautioned
    assert not any("-0%" in line for line in lines)
