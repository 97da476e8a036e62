from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from launcher.config.sections.data import DataSection, Source
from launcher.data import cache_store
from launcher.data.build import build
from launcher.data.cache_store import cache_key
from launcher.data.sources.files import BLOCK_ROWS
from launcher.data.split import Split
from launcher.data.tokenization import batch_encoder
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
