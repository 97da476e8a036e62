"""A data cache with changed files is refused before training reads a damaged block."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.config.sections.train import TrainSection
from launcher.data import cache_store, row_layout
from launcher.data.build import build
from launcher.data.checks import findings
from launcher.data.corpus import EncodedCorpus, read_corpus
from launcher.data.loader import PrefetchLoader, RowBatches, TrainBatches
from launcher.data.report import report
from launcher.data.split import BLOCK_BYTES, DIGESTS, Split, write_split
from launcher.data.tokenization.encoder import load_tokenizer
from launcher.errors import DataError
from launcher.plan.launch_plan import Batch, DataFacts

Section = Callable[..., DataSection]
ROW_TOKENS = 1024
NUM_ROWS = 256
HEADER_BYTES = 128
# A row of tokens takes 4 KiB, so 16 rows share a block.
ROWS_PER_BLOCK = BLOCK_BYTES // (4 * ROW_TOKENS)
BATCH = Batch(
    global_batch_size=2,
    micro_batch_size=1,
    accumulation=2,
    max_tokens_per_step=0,
    tokens_per_step=None,
    max_steps=NUM_ROWS // 2,
    epochs=None,
)
Jsonl = Callable[..., Path]


@pytest.fixture
def facts(tmp_path: Path) -> DataFacts:
    """A cache of 16 token blocks and 4 mask blocks, written in parts that are not aligned to blocks."""
    num_tokens = NUM_ROWS * ROW_TOKENS
    folder = tmp_path / "cache of a key"
    written = [_write(folder, num_tokens), _write(folder / "eval", num_tokens)]
    counts = {name: 1 for name, field in DataFacts.model_fields.items() if field.annotation is int}
    return DataFacts(cache_dir=str(folder), padding_frac=0.0, digest="-".join(written), **counts)


def _write(folder: Path, num_tokens: int) -> str:
    starts = np.arange(0, num_tokens + 1, ROW_TOKENS)
    tokens, trained = np.arange(num_tokens, dtype=np.uint32), np.arange(num_tokens) % 3 == 1
    return write_split(
        folder,
        _parts(tokens),
        _parts(trained.astype(np.uint8)),
        rows=starts,
        docs=starts,
        columns={"source": np.zeros(NUM_ROWS), "num_trained": np.add.reduceat(trained, starts[:-1], dtype=np.int32)},
    )


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    yield from np.split(array, [0, 1, 1000, 70_000, 70_001, 200_000])


def permute(file: Path, block: int = 1) -> None:
    """Swap two tokens within a block."""
    with file.open("r+b") as opened:
        opened.seek(block * BLOCK_BYTES + 400)
        first, second = opened.read(4), opened.read(4)
        opened.seek(-8, os.SEEK_CUR)
        opened.write(second + first)


def set_ones(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[HEADER_BYTES:] = b"\1" * (len(content) - HEADER_BYTES)
    file.write_bytes(content)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def batches(split: Split) -> TrainBatches:
    return TrainBatches(split, BATCH, seed=0, data_rank=0, data_ranks=1, pad_id=0)


def test_written_digests_verify(facts: DataFacts) -> None:
    split, held_out = Split.open(facts), Split.open(facts, held_out=True)
    split.verify()
    held_out.verify()
    assert np.array_equal(split.tokens, np.arange(NUM_ROWS * ROW_TOKENS))
    assert (split.tokens.dtype, split.trained.dtype, len(split.trained)) == (np.uint32, np.uint8, NUM_ROWS * ROW_TOKENS)
    made = batches(split).step(3)
    for micro in made.micro:
        assert micro.input_ids[0, 0] == micro.row_ids[0] * ROW_TOKENS
    sizes = [path.stat().st_size for path in sorted(Path(facts.cache_dir).glob("*.npy"))]
    assert (Path(facts.cache_dir) / DIGESTS).stat().st_size == 8 * sum(1 + -(-size // BLOCK_BYTES) for size in sizes)


def test_permuted_tokens_are_refused_at_the_step_that_reads_them_and_not_before(facts: DataFacts) -> None:
    block = 7
    permute(Path(facts.cache_dir) / "tokens.npy", block)
    split = Split.open(facts)
    ahead = PrefetchLoader(batches(split), torch.device("cpu"))
    order = batches(split).order.at(0, NUM_ROWS).reshape(-1, 2)
    starts, stops = (HEADER_BYTES + 4 * ROW_TOKENS * order + offset for offset in (0, 4 * ROW_TOKENS - 1))
    first = int(np.flatnonzero(((starts // BLOCK_BYTES <= block) & (block <= stops // BLOCK_BYTES)).any(axis=1))[0])
    assert first > 1, "the steps before are not damaged"
    for step in range(first):
        assert ahead.step(step).row_ids == tuple(order[step].tolist())
    with pytest.raises(DataError) as caught:
        ahead.step(first)
    (problem,) = caught.value.problems
    assert f"tokens.npy, bytes {7 * BLOCK_BYTES} to {8 * BLOCK_BYTES - 1}" in problem.where
    assert f"rm -r '{facts.cache_dir}'" in problem.remedy
    with pytest.raises(DataError):
        ahead.step(first)


def test_the_held_out_split_is_verified(facts: DataFacts) -> None:
    permute(Path(facts.cache_dir) / "eval" / "tokens.npy", block=15)
    split = Split.open(facts, held_out=True)
    assert split.tokens[: ROW_TOKENS * (NUM_ROWS - 2 * ROWS_PER_BLOCK)][-1] == ROW_TOKENS * (NUM_ROWS - 2 * ROWS_PER_BLOCK) - 1
    with pytest.raises(DataError, match=r"eval/tokens.npy, bytes \d+ to \d+ \(block 15 of"):
        [RowBatches(split, 1, pad_id=0).load(number) for number in range(split.num_rows)]
    Split.open(facts).verify()


@pytest.mark.parametrize("name", ["rows", "docs", "source", "num_trained"])
def test_index_arrays_are_verified_when_the_split_is_opened(facts: DataFacts, name: str) -> None:
    file = Path(facts.cache_dir) / f"{name}.npy"
    flip(file, file.stat().st_size - 1)
    with pytest.raises(DataError, match=f"{name}.npy, bytes 0 to"):
        Split.open(facts)


def test_a_file_with_another_size_or_header_is_refused(facts: DataFacts) -> None:
    tokens = Path(facts.cache_dir) / "tokens.npy"
    content = tokens.read_bytes()
    for size in (len(content) - 4, len(content) + 4):
        tokens.write_bytes(content[:size].ljust(size))
        with pytest.raises(DataError, match=f"{size:,} bytes, not {len(content):,}"):
            Split.open(facts)
    tokens.write_bytes(content.replace(b"<u4", b"<f4", 1))
    with pytest.raises(DataError, match=r"tokens\.npy, bytes 0 to"):
        Split.open(facts)


def test_arrays_with_other_digests_than_the_plan_are_refused(facts: DataFacts, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(facts.cache_dir, other)
    set_ones(other / "trained.npy")
    array = np.load(other / "trained.npy")
    rows, docs, *columns = (np.load(other / f"{name}.npy") for name in ("rows", "docs", "source", "num_trained"))
    columns = dict(zip(("source", "num_trained"), columns, strict=True))
    digest = write_split(other, [np.load(other / "tokens.npy")], [array], rows, docs, columns)
    swapped = facts.model_copy(update={"cache_dir": str(other)})
    with pytest.raises(DataError, match="its block digests differ from the recorded ones") as caught:
        Split.open(swapped)
    assert digest in caught.value.problems[0].value
    Split.open(swapped, held_out=True)
    flip(Path(facts.cache_dir) / DIGESTS, 9)
    with pytest.raises(DataError, match="its block digests differ from the recorded ones"):
        Split.open(facts)


def test_an_io_error_is_not_reported_as_damage(facts: DataFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split.open(facts)

    def fails(*arguments: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(OSError, match=r"Input/output error: .*/tokens\.npy"):
        split.tokens[BLOCK_BYTES:]


def test_the_report_verifies_every_block(section: Section, tokenizer_dir: Path) -> None:
    data = section(eval_fraction=0.2)
    facts = build(data, str(tokenizer_dir))
    inputs = (data, load_tokenizer(str(tokenizer_dir)).decode, TrainSection(max_steps=1), 0, [])
    report(facts, *inputs)
    for name in ("tokens.npy", "eval/tokens.npy"):
        file = Path(facts.cache_dir) / name
        flip(file, file.stat().st_size - 1)
        with pytest.raises(DataError, match=f"/{name}, bytes 0 to") as caught:
            report(facts, *inputs)
        assert f"`rm -r {facts.cache_dir}`" in caught.value.problems[0].remedy
        flip(file, file.stat().st_size - 1)


def test_an_edited_json_file_rebuilds_the_cache(section: Section, tokenizer_dir: Path) -> None:
    data = section(eval_fraction=0.2)
    facts = build(data, str(tokenizer_dir))
    folder, key = Path(facts.cache_dir), Path(facts.cache_dir).name
    for name in ("findings.json", "samples.json"):
        sound = (folder / name).read_bytes()
        (folder / name).write_bytes(sound.replace(b"0", b"1"))
        assert sound != (folder / name).read_bytes()
        assert cache_store.find(key) is None
        assert build(data, str(tokenizer_dir)) == facts
        assert (folder / name).read_bytes() == sound


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
