from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hand_made
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from plan_fixtures import ConfigOf, config_of
from tokenizers import normalizers
from transformers import AutoTokenizer

from launcher import facts
from launcher.cli import mirror
from launcher.config.schema import RunConfig
from launcher.config.sections.data import GENERAL_TEXT, ChecksSection, DataSection, Source
from launcher.config.sections.evaluation import EvalSet
from launcher.data.build import build, build_eval_sets
from launcher.data.cache_store import read_report
from launcher.data.checks import findings
from launcher.data.sources.builtin import list_texts
from launcher.data.sources.locate import HELD_OUT
from launcher.data.sources.reading import find_row_problems, make_set_data, read_documents
from launcher.data.split import Split
from launcher.data.tokenization.batch_encoder import cut_document
from launcher.data.tokenization.encoder import EncodedDocument
from launcher.errors import ConfigError, DataError
from launcher.models.found_model import find_model

__all__ = ["config_of"]
Jsonl = Callable[..., Path]


def texts(jsonl: Jsonl, name: str, words: list[str]) -> Source:
    return Source(name=name, path=str(jsonl([{"text": word} for word in words], f"{name}.jsonl")), format="text")


def contents(split: Split) -> list[tuple[int, ...]]:
    return [tuple(split.tokens[a:b].tolist()) for a, b in zip(split.docs[:-1], split.docs[1:], strict=True)]


def test_the_sources_of_rows_and_documents_are_known(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    first = texts(jsonl, "first", [f"one {i} " * (1 + i % 7) for i in range(80)])
    second = texts(jsonl, "second", [f"two {i} " * (1 + i % 5) for i in range(40)]).model_copy(update={"epochs": 2.5})
    data = DataSection(sources=(first, second), max_length=64)
    facts = build(data, str(tokenizer_dir))
    split = Split.open(facts)
    lengths = np.diff(split.docs)
    of_source = [int(lengths[split.columns["source"] == i].sum()) for i in (0, 1)]
    report = read_report(facts.cache_dir)
    assert [one["name"] for one in report["sources"]] == ["first", "second"]
    assert [one["read"] for one in report["sources"]] == [80, 40]
    assert [one["num_tokens"] for one in report["sources"]] == of_source
    assert report["sources"][0]["epochs"] == 1
    assert report["sources"][1]["epochs"] == pytest.approx(2.5, abs=0.05)
    seen = [document for document, source in zip(contents(split), split.columns["source"], strict=True) if source == 1]
    assert {seen.count(document) for document in seen} == {2, 3}
    for row in range(split.num_rows):
        a, b = np.searchsorted(split.docs, split.rows[[row, row + 1]])
        here = contents(split)[a:b]
        assert len(set(here)) == len(here), "no row holds a document twice"


def long_texts(first: int, end: int) -> list[str]:
    return [f"Number {i}: " + " ".join(f"{i * n}" for n in range(40)) for i in range(first, end)]


def found_in(cache_dir: str) -> dict[str, findings.Finding]:
    return {finding.name: finding for finding in findings.read(cache_dir)}


def test_a_source_of_weight_0_is_in_no_split(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    words = long_texts(0, 100)
    new = texts(jsonl, "new", words).model_copy(update={"weight": 1.0})
    alone = DataSection(sources=(new,), max_length=256, eval_fraction=0.1, checks=ChecksSection(exact_duplicate="drop"))
    # The same rows, some rows only in this source, and an unreadable row.
    off = texts(jsonl, "off", [*words, *long_texts(100, 130)]).model_copy(update={"weight": 0.0})
    with Path(off.path).open("a") as file:
        file.write("no JSON")
    both = alone.model_copy(update={"sources": (off, new)})
    first, second = (build(data, str(tokenizer_dir)) for data in (alone, both))
    for held_out in (False, True):
        one, other = (Split.open(facts, held_out) for facts in (first, second))
        assert (one.tokens[:].tolist(), one.docs.tolist()) == (other.tokens[:].tolist(), other.docs.tolist())
        assert set(other.columns["source"].tolist()) == {1}
    assert findings.read(second.cache_dir) == findings.read(first.cache_dir)
    assert read_report(second.cache_dir)["sources"][0]["read"] == 0
    # Rows only in that source are no leak, because no run trains on them.
    held_out = texts(jsonl, "held_out", long_texts(100, 130))
    data = both.model_copy(update={"eval_fraction": 0.0, "eval_path": held_out.path})
    assert not {*findings.LEAKS, "no_trained_token"} & found_in(build(data, str(tokenizer_dir)).cache_dir).keys()


@pytest.mark.parametrize("check", ["exact_duplicate", "near_duplicate"])
@pytest.mark.parametrize("limit", [{"epochs": 0.1}, {"weight": 0.05}])
def test_of_two_copies_the_one_in_the_rows_is_kept(
    jsonl: Jsonl, tokenizer_dir: Path, check: str, limit: dict[str, float]
) -> None:
    words = long_texts(1, 60)
    suffix = "" if check == "exact_duplicate" else " on"
    old = texts(jsonl, "old", [*words, *long_texts(60, 70)]).model_copy(update=limit)
    whole = {"weight": 1.0} if "weight" in limit else {}
    new = texts(jsonl, "new", [word + suffix for word in words]).model_copy(update=whole)
    checks = ChecksSection(**{check: "drop"})
    facts = build(DataSection(sources=(old, new), max_length=256, checks=checks), str(tokenizer_dir))
    of_source = {one["name"]: one for one in read_report(facts.cache_dir)["sources"]}
    assert (of_source["new"]["dropped"], of_source["new"]["num_docs"]) == (0, 59)
    assert of_source["old"]["dropped"] == 59
    assert 0 < of_source["old"]["num_docs"] < 10


def test_findings_on_training_count_documents_in_rows(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    rows = [{"prompt": f"{i}:", "completion": text} for i, text in enumerate(long_texts(0, 80))]
    source = Source(path=str(jsonl(rows)), max_tokens=3000)
    data = DataSection(sources=(source,), max_length=256, eval_path=str(jsonl(rows, "held_out.jsonl")))
    facts = build(data, str(tokenizer_dir))
    found = found_in(facts.cache_dir)
    assert 0 < facts.num_docs < 40
    assert found["few_examples"].count == found["held_out_in_train"].count == facts.num_docs
    assert found["held_out_in_train"].total == 80
    # Dropped leaks are not replaced by other documents of the source.
    dropping = data.model_copy(update={"checks": ChecksSection(held_out_in_train="drop")})
    with pytest.raises(DataError, match="no document with a trained token"):
        build(dropping, str(tokenizer_dir))


@pytest.mark.parametrize(
    ("long_documents", "num_docs", "counts"),
    [
        ("truncate", 3, {"truncated_docs": 1, "truncated_tokens": 41 - 16, "split_docs": 0, "dropped": 0, "dropped_long": 0}),
        ("split", 5, {"truncated_docs": 0, "truncated_tokens": 0, "split_docs": 1, "dropped": 0, "dropped_long": 0}),
        ("drop", 2, {"truncated_docs": 0, "truncated_tokens": 0, "split_docs": 0, "dropped": 1, "dropped_long": 1}),
    ],
)
def test_documents_longer_than_a_row(
    jsonl: Jsonl, tokenizer_dir: Path, long_documents: str, num_docs: int, counts: dict[str, int]
) -> None:
    source = texts(jsonl, "words", ["a b", " word" * 40, "c d e"])
    facts = build(DataSection(sources=(source,), max_length=16, long_documents=long_documents), str(tokenizer_dir))
    assert facts.num_docs == num_docs
    report = read_report(facts.cache_dir)["sources"][0]
    assert {name: report[name] for name in counts} == counts
    split = Split.open(facts)
    assert not split.trained[np.asarray(split.docs[:-1])].any(), "nothing stands before a piece's first token"
    found = {finding.name for finding in findings.read(facts.cache_dir)}
    assert "no_trained_token" not in found


@pytest.mark.parametrize(("long_documents", "found"), [("truncate", (4, 5)), ("split", None), ("drop", None)])
def test_an_end_of_turn_that_is_cut_off_is_found(
    jsonl: Jsonl, tokenizer_dir: Path, long_documents: str, found: tuple[int, int] | None
) -> None:
    answers = [" word" * 40, " word" * 41, " word" * 42, " word" * 43, " brief"]
    source = Source(path=str(jsonl([{"prompt": "Say:", "completion": answer} for answer in answers])), completions="text")
    data = DataSection(sources=(source,), max_length=16, long_documents=long_documents)
    judged = findings.judge(findings.read(build(data, str(tokenizer_dir)).cache_dir), data.checks)
    ends = {one.finding.name: one for one in judged}.get("no_turn_end")
    assert found == (None if ends is None else (ends.finding.count, ends.finding.total))
    if ends is not None:
        assert ends.fatal
        assert ends.finding.examples[0].detail == "none within the first 16 tokens"


def test_splitting_a_long_document_keeps_every_token() -> None:
    ids = np.arange(100, 150, dtype=np.uint32)
    trained = np.ones(50, dtype=np.uint8)
    trained[0] = 0
    whole = EncodedDocument(ids, trained, (49,))
    pieces = cut_document(whole, 16, "split")
    assert np.concatenate([piece.ids for piece in pieces]).tolist() == ids.tolist()
    assert [len(piece.ids) for piece in pieces] == [16, 16, 16, 2]
    assert [piece.turn_ends for piece in pieces] == [(), (), (), (1,)]
    assert [int(piece.trained.sum()) for piece in pieces] == [15, 15, 15, 1]
    assert trained.sum() == 49, "the document itself is as it was"
    assert cut_document(whole, 50, "drop") == [whole]
    assert cut_document(whole, 49, "drop") == []


def test_pieces_without_a_trained_token_are_left_out() -> None:
    trained = np.zeros(40, dtype=np.uint8)
    trained[35:] = 1
    answer_last = EncodedDocument(np.arange(40, dtype=np.uint32), trained, (39,))
    assert [piece.ids.tolist() for piece in cut_document(answer_last, 16, "split")] == [list(range(32, 40))]
    untrained = EncodedDocument(np.arange(40, dtype=np.uint32), np.zeros(40, dtype=np.uint8), ())
    assert [len(piece.ids) for piece in cut_document(untrained, 16, "split")] == [16]


def test_dropped_documents_are_in_no_row(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    rows = [{"prompt": f"{i}:", "completion": f" {i * i}"} for i in range(30)]
    rows += [{"prompt": "0:", "completion": " 0"}, {"prompt": "31:", "completion": " "}]
    source = Source(path=str(jsonl(rows)))
    kept = build(DataSection(sources=(source,), max_length=64), str(tokenizer_dir))
    assert (kept.num_docs, read_report(kept.cache_dir)["dropped_docs"]) == (31, 1)
    fewer = build(DataSection(sources=(source,), max_length=64, checks=ChecksSection(exact_duplicate="drop")), str(tokenizer_dir))
    assert (fewer.num_docs, read_report(fewer.cache_dir)["dropped_docs"]) == (30, 2)
    assert len(set(contents(Split.open(fewer)))) == 30


def test_rows_with_an_ambiguous_mask_are_left_out(jsonl: Jsonl, tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    # In the second row, the completion begins with a combining accent for the prompt's last letter.
    rows = [{"prompt": "na", "completion": completion} for completion in (" one", "\u0308ve", " two")]
    source = Source(path=str(jsonl(rows)), completions="text")
    data = DataSection(sources=(source,), max_length=64, checks=ChecksSection(dropped="keep"))
    facts = build(data, str(tmp_path / "tokenizer"))
    assert facts.num_docs == 2
    (finding,) = (one for one in findings.read(facts.cache_dir) if one.name == "unsure_border")
    assert [example.where for example in finding.examples] == [f"{source.path}:2"]
    (refused,) = findings.problems(findings.read(facts.cache_dir), ChecksSection())
    assert "data.checks.dropped=keep" in refused.remedy
    alone = data.model_copy(update={"sources": (Source(path=str(jsonl(rows[1:2])), completions="text"),)})
    with pytest.raises(DataError, match="no document with a trained token is left") as caught:
        build(alone, str(tmp_path / "tokenizer"))
    assert "documents whose trained part begins or ends inside a token: 1" in caught.value.problems[0].value


def test_conversations_out_of_order_are_dropped_before_rendering(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = Source(path=str(jsonl([{"messages": turns}, {"messages": turns[::-1]}])))
    data = DataSection(sources=(source,), max_length=64)
    with pytest.raises(DataError, match="begins with the assistant") as caught:
        build(data, str(tokenizer_dir))
    assert "data.checks.role_order=drop" in caught.value.problems[0].remedy
    dropping = data.model_copy(update={"checks": ChecksSection(role_order="drop")})
    facts = build(dropping, str(tokenizer_dir))
    assert facts.num_docs == 1
    found = {one.name: one.count for one in findings.read(facts.cache_dir)}
    assert (found["role_order"], "no_trained_token" in found) == (1, False)


REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_one_pass_reports_all_rows_that_cannot_be_used_and_the_findings_of_the_others(
    jsonl: Jsonl, tokenizer_dir: Path, tmp_path: Path
) -> None:
    def chat(text: str, *system: str) -> str:
        roles = (*(("system",) * len(system)), "user", "assistant")
        return json.dumps(
            {"messages": [{"role": r, "content": t} for r, t in zip(roles, (*system, "Say it.", text), strict=True)]}
        )

    lines = [chat(f"word {i} " * (40 if i % 2 else 1)) for i in range(40)]
    # Faulty rows occur both before and after the first usable row.
    lines[1] = json.dumps({"note": "the keys of no format"})
    lines[0] = lines[7] = lines[30] = lines[31] = "{broken"
    lines[8], lines[9] = json.dumps({"messages": "none"}), json.dumps({"remark": "no messages"})
    lines[20], lines[21] = chat("word", "Be brief."), chat("word", "Be long.")
    path, template = tmp_path / "faulty.jsonl", tmp_path / "refusing.jinja"
    path.write_text("".join(f"{line}\n" for line in lines))
    template.write_text(REFUSING)
    table = tmp_path / "table.csv"
    table.write_text("text,number\nword,1\nword\n")
    sources = (Source(name="faulty", path=str(path)), Source(name="table", path=str(table)))
    data = DataSection(
        sources=sources, max_length=64, chat_template=str(template), workers=1, eval_path=str(jsonl([{"text": ""}]))
    )
    with pytest.raises(DataError) as caught:
        build(data, str(tokenizer_dir))
    places = [problem.where for problem in caught.value.problems]
    assert {
        *(f"{path}:1:2; {path}:8:2; {path}:31:2 and 1 more", f"{path}:9", f"{path}:2; {path}:10", f"{path}:21; {path}:22"),
        f"{table}:3",
    } < set(places)
    assert any(place.startswith(f"{path}:4; ") for place in places), "the documents that are cut off"
    assert sum("data.checks.bad_rows=drop" in problem.remedy for problem in caught.value.problems) == 1

    # Dropped bad rows are a finding. A file that cannot be read to its end is an error.
    dropping = data.model_copy(update={"checks": ChecksSection(bad_rows="drop", truncated="keep")})
    with pytest.raises(DataError, match="the row has 1 cells") as caught:
        build(dropping, str(tokenizer_dir))
    (left_out,) = (problem for problem in caught.value.problems if "rows that cannot be used" in problem.message)
    assert left_out.remedy.endswith("data.checks.dropped=keep")
    facts = build(dropping.model_copy(update={"sources": sources[:1]}), str(tokenizer_dir))
    finding = next(one for one in findings.read(facts.cache_dir) if one.name == "bad_rows")
    assert (finding.count, finding.total, finding.sources) == (9, 41, {"faulty": 9})
    assert {example.where for example in finding.examples} == {f"{path}:{line}" for line in ("1:2", "2", "9")}
    assert [one.finding.name for one in findings.judge((finding,), dropping.checks) if one.fatal] == ["bad_rows"]
    assert findings.problems((finding,), ChecksSection(bad_rows="drop", dropped="keep")) == []
    # An evaluation finds the same documents in the file.
    usable = [document.where for document, _ in read_documents(sources[0], dropping.checks)]
    assert len(usable) == 33
    with pytest.raises(DataError, match="the line is not JSON"):
        list(read_documents(sources[0], data.checks))


def test_a_source_of_texts_and_answers_is_refused_unless_its_format_is_set(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    path = jsonl([{"prompt": "1+1=", "completion": "2"}, {"text": "1+1=2"}, {"prompt": "1+2=", "completion": "3"}])
    data = DataSection(sources=(Source(path=str(path)),), max_length=64, workers=1)
    with pytest.raises(DataError, match="2 rows with answers and 1 row of plain text") as caught:
        build(data, str(tokenizer_dir))
    assert [problem.where for problem in caught.value.problems] == [f"{path}:2; {path}:1"]
    named = data.model_copy(update={"sources": (Source(path=str(path), format="text"),)})
    with pytest.raises(DataError, match="text"):
        build(named, str(tokenizer_dir))


@pytest.mark.parametrize("fault", ["template syntax", "ids"])
def test_one_pass_reports_an_unusable_template_with_the_rows_that_cannot_be_used(
    tokenizer_dir: Path, tmp_path: Path, fault: str
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for %}" if fault == "template syntax" else REFUSING)
    path = tmp_path / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]}
    path.write_text(f'{json.dumps(good)}\n{{broken\n{{"messages": "none"}}\n')
    data = DataSection(sources=(Source(path=str(path)),), max_length=64, chat_template=str(template), workers=1)
    with pytest.raises(DataError) as caught:
        build(data, str(tokenizer_dir), num_embeddings=100 if fault == "ids" else 1 << 20)
    places = {problem.where for problem in caught.value.problems}
    assert places == {f"{path}:1" if fault == "template syntax" else "model.tokenizer", f"{path}:2:2", f"{path}:3"}


@pytest.mark.parametrize("key", ["model.tokenizer", "data.chat_template"])
def test_an_unusable_tokenizer_or_template_file_is_named(jsonl: Jsonl, tokenizer_dir: Path, tmp_path: Path, key: str) -> None:
    folder, template = tmp_path / "tokenizer", tmp_path / "template.jinja"
    shutil.copytree(tokenizer_dir, folder)
    template.write_bytes(b"\xff" if key == "data.chat_template" else REFUSING.encode())
    if key == "model.tokenizer":
        (folder / "tokenizer.json").write_text("{broken")
    source = Source(path=str(jsonl([{"text": "a"}])))
    with pytest.raises(DataError) as caught:
        build(DataSection(sources=(source,), max_length=64, chat_template=str(template), workers=1), str(folder))
    assert [problem.where for problem in caught.value.problems] == [key]


def test_questions_and_answers_are_written_with_the_chat_template(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    rows = [{"question": "How many apples so far?", "answer": " First find them."}]
    rows += [{"question": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "answer": "Hello"}]

    def build_as(completions: str) -> tuple[list[str], tuple[int, int]]:
        source = Source(name="gsm", path=str(jsonl(rows)), completions=completions)
        facts = build(DataSection(sources=(source,), max_length=64), str(tokenizer_dir))
        tokenizer, split = AutoTokenizer.from_pretrained(str(tokenizer_dir)), Split.open(facts)
        texts = [tokenizer.decode(split.tokens[a:b]) for a, b in itertools.pairwise(split.docs.tolist())]
        (counts,) = read_report(facts.cache_dir)["sources"]
        return sorted(texts), (counts["completions"], counts["completions_as_chat"])

    (chat, rendered), counts = build_as("auto")
    assert chat.strip().endswith("How many apples so far?<|im_end|>\n<|im_start|>assistant\nFirst find them.<|im_end|>")
    assert rendered == f"{rows[1]['question']}Hello<|im_end|>", "a prompt with control tokens is taken as it is"
    assert counts == (2, 1)
    texts, counts = build_as("text")
    assert texts[1] == "How many apples so far? First find them.<|im_end|>"
    assert counts == (2, 0)
    assert all("<|im_start|>assistant" in text for text in build_as("chat")[0])


def test_a_part_of_a_table_that_cannot_be_read_is_no_bad_row(tokenizer_dir: Path, tmp_path: Path) -> None:
    """One row of a 256-row part is not UTF-8, so the whole part is unreadable."""
    texts = [f"word {i}".encode() for i in range(600)]
    texts[300] = b"\xff\xfe"
    column = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    checks = ChecksSection(bad_rows="drop")
    data = DataSection(sources=(Source(name="table", path=str(path)),), workers=1, checks=checks)
    with pytest.raises(DataError) as caught:
        build(data, str(tokenizer_dir))
    assert caught.value.problems[0].where == f"{path}, after row 256"
    problems = find_row_problems(data.sources[0])
    assert (len(problems), problems.num_rows) == (1, 0)


def test_leaving_out_bad_rows_is_not_advised_if_every_row_is_bad(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    for good, is_advised in (([], False), ([{"text": "good"}], True)):
        path = jsonl([*good, {"text": 1}, {"text": None}])
        with pytest.raises(DataError) as caught:
            build(DataSection(sources=(Source(path=str(path), format="text"),), workers=1), str(tokenizer_dir))
        assert any("bad_rows=drop" in problem.remedy for problem in caught.value.problems) is is_advised


# Evaluation sets


Section = Callable[..., DataSection]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_problems_of_all_sets_are_reported_with_their_names(section: Section, tokenizer_dir: Path, tmp_path: Path) -> None:
    question = {"role": "user", "content": "Which?"}
    answered = {"messages": [question, {"role": "assistant", "content": "This."}]}
    sets = (
        EvalSet(name="good", path=write_rows(tmp_path / "good.jsonl", [answered])),
        EvalSet(name="silent", path=write_rows(tmp_path / "silent.jsonl", [{"messages": [question]}] * 2)),
        EvalSet(name="odd", path=write_rows(tmp_path / "odd.jsonl", [{"foo": 1}])),
        EvalSet(name="few", path=write_rows(tmp_path / "few.jsonl", [answered, *[{"messages": [question]}] * 9])),
    )
    by_setting = {f"eval.sets[{number}]": one for number, one in enumerate(sets)}
    with pytest.raises(DataError) as error:
        build_eval_sets(by_setting, section(), str(tokenizer_dir), lambda stage, done, total: None)
    silent, odd, few = error.value.problems
    assert silent.where == f"eval.sets[1] (silent), {sets[1].path}"
    assert odd.where == f"eval.sets[2] (odd), {sets[2].path}:1"
    assert few.where.startswith("eval.sets[3] (few)")
    built = build_eval_sets({"eval.sets[0]": sets[0]}, section(), str(tokenizer_dir), lambda stage, done, total: None)
    assert (built["good"].num_docs, built["good"].num_eval_rows) == (1, 0)


def test_a_set_is_read_as_held_out_data_is(section: Section, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"text": split}])
    data = section(eval_fraction=0.5, checks={"dropped": "keep", "empty_answer": "fail"})
    made = make_set_data(EvalSet(name="own", path=str(tmp_path), format="text"), data)
    (source,) = made.sources
    assert (source.name, source.split, source.format) == ("own", HELD_OUT, "text")
    assert (made.eval_fraction, made.max_length, made.checks.dropped) == (0.0, data.max_length, "keep")
    (file,) = make_set_data(EvalSet(name="own", path=write_rows(tmp_path / "a.jsonl", [{"text": "a"}])), data).sources
    assert file.split is None


def test_general_text_is_an_evaluation_set_and_no_training_data(
    section: Section, tokenizer_dir: Path, config_of: ConfigOf
) -> None:
    evaluation = config_of("model=tiny", "eval.forgetting=true", "checkpoint.best_set=forgetting").eval
    (setting,) = evaluation.sets_by_setting
    assert setting == "eval.forgetting"
    built = build_eval_sets(evaluation.sets_by_setting, section(), str(tokenizer_dir), lambda stage, done, total: None)
    assert built["forgetting"].num_docs == 137
    assert 180_000 < sum(len(text) for text in list_texts()) < 220_000
    config = config_of("model=tiny", "data=jsonl", f"data.path={GENERAL_TEXT}")
    with pytest.raises(ConfigError) as error:
        facts.check(config, find_model(config.model))
    problem = next(problem for problem in error.value.problems if problem.value == GENERAL_TEXT)
    assert (problem.where, problem.value) == ("data.sources[0].path", GENERAL_TEXT)
    assert "eval.forgetting=true" in problem.remedy
    for file in (Path(__file__).parents[2] / "conf").rglob("*.yaml"):
        assert GENERAL_TEXT not in file.read_text(), "no preset trains on it"


# The rebuilt data of a fetched run, which must be the data that it was trained on


def test_other_data_with_the_same_counts_is_refused(
    jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built_here(config: RunConfig) -> None:
        build(config.data, str(tokenizer_dir))

    # Build in this process instead of a worker.
    monkeypatch.setattr(mirror, "prepare", built_here)
    rows = [{"prompt": f"{i}:", "completion": f" {i + 1}"} for i in range(8)]
    source = jsonl(rows)
    settings = {
        "model": {"path": str(tokenizer_dir)},
        "data": {"sources": [{"path": str(source), "completions": "text"}], "max_length": 32},
    }
    made = hand_made.plan(tmp_path / "run", {**settings, "train": {"max_steps": 4}})
    trained = build(DataSection.model_validate(settings["data"]), str(tokenizer_dir))
    plan = made.model_copy(update={"data": trained.model_copy(update={"cache_dir": "/elsewhere/data/0123"})})
    assert mirror._find_or_build_data(plan, plan.config) == trained
    jsonl([{**row, "completion": row["completion"][::-1]} if row["prompt"] == "7:" else row for row in reversed(rows)])
    other = build(plan.config.data, str(tokenizer_dir))
    assert other.model_dump(exclude={"cache_dir", "digest"}) == trained.model_dump(exclude={"cache_dir", "digest"})
    with pytest.raises(DataError, match="differs from the data that the run was trained on") as caught:
        mirror._find_or_build_data(plan, plan.config)
    assert caught.value.problems[0].value == f"digest: {other.digest} on this machine, {trained.digest} in the run"
