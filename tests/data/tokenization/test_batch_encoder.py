"""Documents are encoded in batches by several processes, and with the fast tokenizer's own batches."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.config.sections.data import DataSection, Source
from launcher.data import cache_store
from launcher.data.build import build
from launcher.data.cache_store import cache_key
from launcher.data.sources.files import BLOCK_ROWS
from launcher.data.split import Split
from launcher.data.tokenization import batch_encoder, fast_tokenizer
from launcher.data.tokenization.fast_tokenizer import count_tokens_before, make_cached
from launcher.errors import DataError

DEADLINE_S = 120.0
# Enough batches that some are submitted before the first result returns, and some after.
NUM_BATCHES = 7
NUM_ROWS = NUM_BATCHES * BLOCK_ROWS
# Prints the process ids once the first batch is back, and continues after a line on stdin.
BUILDER = """
import signal, sys, psutil
from launcher.config.sections.data import DataSection
from launcher.data.tokenization import batch_encoder
from launcher.data.build import build
from launcher.data.tokenization.encoder import import_tokenizers_without_torch
from launcher.errors import DataError
# Whatever started the tests may have them ignore Ctrl-C, as shells do in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
batch_encoder.MIN_BYTES = 1
# As launcher.worker.prepare does.
import_tokenizers_without_torch()
waited = False
def progress(stage, done, total):
    global waited
    if done and not waited:
        waited = True
        print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
        sys.stdin.readline()
try:
    build(DataSection.model_validate_json(sys.argv[1]), sys.argv[2], progress)
except DataError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""
KINDS = ("gpt2", "smollm", "qwen2", "llama3")


@pytest.fixture
def many(jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> DataSection:
    """Batches encoded by several processes. tests/cli/test_data_command.py tests the threshold for that."""
    monkeypatch.setattr(batch_encoder, "MIN_BYTES", 1)
    rows = [{"prompt": f"{i}:", "completion": f" {i * i}" * (1 + i % 5)} for i in range(NUM_ROWS)]
    return DataSection(sources=(Source(path=str(jsonl(rows)), completions="text"),), max_length=128, eval_fraction=0.1, workers=2)


@pytest.fixture
def builder(many: DataSection, tokenizer_dir: Path) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:
    """A builder that waits while its processes run; the test's end kills those that remain."""
    command = [sys.executable, "-c", BUILDER, many.model_dump_json(), str(tokenizer_dir)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    started = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None
    children = [psutil.Process(int(pid)) for pid in started.stdout.readline().split()]
    yield started, children
    for process in [started, *children]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    started.communicate(timeout=DEADLINE_S)


def workers_of(children: list[psutil.Process]) -> list[psutil.Process]:
    """Return the encoding processes: forks of the fork server, which is a child of the builder."""
    numbers = {child.pid for child in children}
    return [child for child in children if child.ppid() in numbers]


@pytest.mark.rest
def test_several_processes_build_what_one_builds(many: DataSection, tokenizer_dir: Path, cache_home: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    folder = Path(build(many, str(tokenizer_dir), lambda *counts: progress.append(counts)).cache_dir)
    alone = cache_home / "alone"
    shutil.move(folder, alone)
    assert build(many.model_copy(update={"workers": 1}), str(tokenizer_dir)).cache_dir == str(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(alone)) for path in alone.rglob("*") if path.is_file())
    for name in names:
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
    tokenized = [done for stage, done, _ in progress if stage == "tokenize"]
    assert tokenized == sorted(tokenized)
    assert len(tokenized) > NUM_BATCHES
    assert tokenized[-1] == NUM_ROWS


@pytest.mark.rest
def test_a_killed_worker_is_reported_and_leaves_no_cache(
    builder: tuple[subprocess.Popen, list[psutil.Process]], cache_home: Path
) -> None:
    started, children = builder
    workers = workers_of(children)
    assert len(workers) == 2
    workers[0].kill()
    output, errors = started.communicate("go on\n", timeout=DEADLINE_S)
    assert started.returncode == DataError.exit_code, errors
    assert "data.workers" in output
    assert [entry.suffix for entry in (cache_home / "data").iterdir()] == [".lock"]
    assert not psutil.wait_procs(children, timeout=DEADLINE_S)[1]


def test_a_worker_reports_its_own_exception(many: DataSection, tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tokenizer_dir, folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError):
        build(many, str(folder))


@pytest.mark.rest
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_builder_takes_its_processes_along(
    builder: tuple[subprocess.Popen, list[psutil.Process]], many: DataSection, tokenizer_dir: Path, by: signal.Signals
) -> None:
    started, children = builder
    if by == signal.SIGINT:
        # Like a terminal, signal every process of the group.
        os.killpg(started.pid, by)
    else:
        started.kill()
    _, errors = started.communicate(timeout=DEADLINE_S)
    assert not psutil.wait_procs(children, timeout=DEADLINE_S)[1]
    key = cache_key(many, str(tokenizer_dir))
    assert cache_store.find(key) is None
    if by == signal.SIGINT:
        assert not cache_store.cache_dir(key).with_suffix(".partial").exists()
        assert errors.count("Traceback") == 1, "the workers keep quiet"


def test_a_small_file_starts_no_process(jsonl: Callable[..., Path], tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_encoder, "ProcessPoolExecutor", None)
    rows = [{"prompt": f"{i}:", "completion": f" {i * i}"} for i in range(2000)]
    data = DataSection(sources=(Source(path=str(jsonl(rows))),), max_length=128, eval_fraction=0, workers=2)
    assert build(data, str(tokenizer_dir)).num_docs == 2000


def test_every_token_of_every_document_is_in_the_cache_once(many: DataSection, tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    facts = build(many, str(tokenizer_dir))
    documents = []
    for split in (Split.open(facts), Split.open(facts, held_out=True)):
        assert np.diff(split.rows).max() <= many.max_length
        documents += [tuple(split.tokens[a:b].tolist()) for a, b in zip(split.docs[:-1], split.docs[1:], strict=True)]
    rows = [json.loads(line) for line in Path(many.sources[0].path).read_text().splitlines()]
    texts = [row["prompt"] + row["completion"] for row in rows]
    whole = tokenizer(texts, add_special_tokens=False).input_ids
    # If lists differed, pytest would take minutes to explain the difference.
    assert set(documents) == {(*ids, tokenizer.eos_token_id) for ids in whole}
    assert len(documents) == len(whole)


CORPUS = [
    "The quick brown fox's den, isn't it? 1234 99 x_y(z)\n\n  def f(a):\n\treturn a  # don't\r\n",
    string.printable,
    "caf\u00e9 \u00c0 la \u2013 \u201cd\u00e9j\u00e0\u201d, 5\u00a0\u20ac \u00d7 \u00b2",
    "<|end",
]


@cache
def tokenizer(kind: str) -> Tokenizer:
    """Return a small tokenizer that splits text like one of the families."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = {"qwen2": fast_tokenizer._QWEN2, "llama3": fast_tokenizer._LLAMA3}.get(kind)
    if kind == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS * 3, trainer)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|end|>", "<|end|>>", "<x>")])
    return made


SERVED = [character for character in map(chr, range(0x2200)) if fast_tokenizer._SUPPORTED.fullmatch(character)]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["<|end|>", "<|end|>>", "<x>", "'s", "'LL", "'re", " the", "12345", "\r\n", "\n\n", "   ", "\t", "\x1c", "\x7f"]
        ),
        st.text(st.characters(max_codepoint=127), max_size=8),
        st.text(st.sampled_from(SERVED), max_size=8),
    ),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_cached_tokens_and_offsets_equal_those_of_the_tokenizer(kind: str, text: str) -> None:
    asked = tokenizer(kind)
    known = make_cached(asked)
    assert known is not None
    encoded = known.encode(text)
    expected = asked.encode(text, add_special_tokens=False)
    assert encoded is not None
    assert encoded[0].tolist() == expected.ids
    assert encoded[0].dtype == np.uint32
    if text.isascii():
        assert encoded[1].tolist() == [end for _, end in expected.offsets]
    for border in range(len(text) + 1):
        before = expected.char_to_token(border) if border < len(text) else len(expected.ids)
        starts = border == len(text) or expected.token_to_chars(before)[0] == border
        found_before = count_tokens_before(text, [border], encoded[1])
        assert found_before == ([before] if starts else None), border


def test_the_demonstration_tokenizer_is_cached(session_tokenizer: PreTrainedTokenizerBase) -> None:
    asked = session_tokenizer.backend_tokenizer
    known = make_cached(asked)
    assert known is not None
    chats = [[{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": f"It's {a + b}.\n"}]
             for a, b in itertools.product(range(0, 2000, 97), repeat=2)]  # fmt: skip
    texts = [str(text) for text in session_tokenizer.apply_chat_template(chats, tokenize=False)]
    expected = [encoding.ids for encoding in asked.encode_batch(texts, add_special_tokens=False)]
    assert [known.encode(text)[0].tolist() for text in texts] == expected


def test_unsupported_text_is_left_to_the_tokenizer() -> None:
    known = make_cached(tokenizer("gpt2"))
    assert known is not None
    for character in ("\u00a0", "\u00b2", "\u00b5", "e\u0301", "\u4e2d", "\u212b", "\u2003"):
        assert known.encode(f"caf{character}") is None
    assert [len(encoded) for encoded in known.encode("")] == [0, 0]


def altered(**changes: object) -> Tokenizer:
    parts = json.loads(tokenizer("llama3").to_str())
    return Tokenizer.from_str(json.dumps({**parts, **changes}))


def test_an_unsupported_tokenizer_is_not_cached() -> None:
    parts = json.loads(tokenizer("llama3").to_str())
    assert make_cached(altered()) is not None
    assert make_cached(altered(normalizer={"type": "Lowercase"})) is None
    assert make_cached(altered(pre_tokenizer={"type": "Whitespace"})) is None
    assert make_cached(altered(pre_tokenizer=None)) is None
    swallows = [{**token, "rstrip": True} for token in parts["added_tokens"]]
    assert make_cached(altered(added_tokens=swallows)) is None
    assert make_cached(altered(model={**parts["model"], "dropout": 0.1})) is None
    steps = parts["pre_tokenizer"]["pretokenizers"]
    other = {**steps[0], "pattern": {"Regex": r"\p{L}+|."}}
    assert make_cached(altered(pre_tokenizer={"type": "Sequence", "pretokenizers": [other, steps[1]]})) is None


def test_text_with_a_byte_outside_the_vocabulary_is_left_to_the_tokenizer() -> None:
    small = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = fast_tokenizer.CachedTokenizer(small, fast_tokenizer._PATTERNS[fast_tokenizer._GPT2], {})
    assert known.encode("ab") is not None
    assert known.encode("abc") is None


def test_the_word_cache_has_a_maximum_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_tokenizer, "MAX_WORDS", 10)
    known = make_cached(tokenizer("gpt2"))
    assert known is not None
    text = " ".join(f"word{chr(97 + i)}" for i in range(26))
    assert known.encode(text)[0].tolist() == tokenizer("gpt2").encode(text, add_special_tokens=False).ids
    assert len(known._word_ids) <= 10
