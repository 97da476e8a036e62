"""Building the data cache: read, render, tokenise, hold out, pack, write. Runs on CPU, once per content key."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from launcher.config.data import DataSection, Source
from launcher.data import cache, packing, sources
from launcher.data.cache import Split
from launcher.data.chat import Encoded, Encoder, load_tokenizer
from launcher.data.sources import Document
from launcher.errors import DataError, Problem
from launcher.plan.launch_plan import DataFacts

BATCH_DOCS = 1024
NUM_SAMPLES = 4

Progress = Callable[[str, int, int], None]


@dataclass
class _Collected:
    """The documents of one split, and what was counted on the way."""

    ids: list[np.ndarray] = field(default_factory=list)
    trained: list[np.ndarray] = field(default_factory=list)
    truncated_docs: int = 0
    truncated_tokens: int = 0
    dropped_docs: int = 0
    docs_with_turn_end: int = 0

    def add(self, encoded: Encoded, max_length: int) -> bool:
        """Keep the first `max_length` tokens; False where none of them is trained, then the document is dropped."""
        lost = max(0, len(encoded.ids) - max_length)
        self.truncated_docs += lost > 0
        self.truncated_tokens += lost
        trained = encoded.trained[:max_length]
        if not trained.any():
            self.dropped_docs += 1
            return False
        self.ids.append(encoded.ids[:max_length])
        self.trained.append(trained)
        self.docs_with_turn_end += any(position < max_length for position in encoded.turn_ends)
        return True


def build(data: DataSection, tokenizer_path: str, on_progress: Progress | None = None) -> DataFacts:
    """The facts of the cache for `data` and the tokenizer in the folder `tokenizer_path`, built first where there is none.

    `on_progress(stage, done, total)` is called with counts of documents; `total` is an upper bound.
    Errors: DataError for a source, a row or a template that cannot be used, and where nothing is left to train on.
    """
    if problems := sources.check_sources(data):
        raise DataError(problems)
    key = cache.cache_key(data, tokenizer_path)
    if (facts := cache.find(key)) is not None:
        return facts
    with cache.building(key) as folder:
        if folder is not None:
            _build_into(folder, data, tokenizer_path, on_progress or (lambda stage, done, total: None))
    facts = cache.find(key)
    if facts is None:
        raise DataError(Problem("the data cache vanished while it was built", str(cache.cache_dir(key)), remedy="try again"))
    return facts


def _build_into(folder: Path, data: DataSection, tokenizer_path: str, on_progress: Progress) -> None:
    encoder = Encoder(load_tokenizer(tokenizer_path))
    train, held_out = _Collected(), _Collected()
    sample_docs: list[Document] = []
    for batch in _batches(data, on_progress):
        encoded = encoder.encode([encoder.render(document) for document, _ in batch])
        for (document, is_held_out), tokens in zip(batch, encoded, strict=True):
            kept = (held_out if is_held_out else train).add(tokens, data.max_length)
            if kept and is_held_out and len(tokens.ids) <= data.max_length:
                sample_docs.append(document)
    if not train.ids:
        what = "no document with a trained token is left to train on"
        where = ", ".join(source.path for source in data.sources)
        remedy = "give rows with an assistant message or a completion, raise data.max_length, or lower data.eval_fraction"
        raise DataError(Problem(what, where, f"{train.dropped_docs} documents were dropped", remedy))
    on_progress("pack and write", 0, 1)
    train_split = _split(train, data, max_rows=None)
    eval_split = _split(held_out, data, max_rows=data.eval_max_rows)
    train_split.save(folder)
    eval_split.save(folder / "eval")
    cache.write_json(folder / "samples.json", _samples(encoder, sample_docs))
    cache.finish(folder, _facts(train, train_split, eval_split, data), _report(train, held_out, eval_split))
    on_progress("pack and write", 1, 1)


def _batches(data: DataSection, on_progress: Progress) -> Iterator[list[tuple[Document, bool]]]:
    """All documents in batches, each with True where it is held out."""
    inputs = [(source, False) for source in data.sources]
    if data.eval_path is not None:
        formats = {source.format for source in data.sources if source.path != sources.STDLIB_DOCS}
        inputs.append((Source(path=data.eval_path, format=formats.pop() if len(formats) == 1 else "auto"), True))
    total = sum(sources.count_rows(source) for source, _ in inputs)
    done = 0
    documents = _documents(inputs, data)
    while batch := list(itertools.islice(documents, BATCH_DOCS)):
        on_progress("tokenise", done, total)
        yield batch
        done += len(batch)
    on_progress("tokenise", done, done)


def _documents(inputs: list[tuple[Source, bool]], data: DataSection) -> Iterator[tuple[Document, bool]]:
    """Each document once; where data.eval_path is set, the sources' own held-out documents belong to neither split."""
    for source, is_eval_file in inputs:
        brings_split = source.path == sources.STDLIB_DOCS
        for document, held_out_by_source in sources.read_documents(source):
            if data.eval_path is not None:
                if not held_out_by_source:
                    yield document, is_eval_file
            else:
                yield document, held_out_by_source if brings_split else _share(document) < data.eval_fraction


def _share(document: Document) -> float:
    """A number in [0, 1) from the document's content: equal documents fall on the same side, added rows move none."""
    content = [value for name, value in vars(document).items() if name != "where"]
    return xxhash.xxh3_64_intdigest(repr(content).encode()) / 2**64


def _split(collected: _Collected, data: DataSection, max_rows: int | None) -> Split:
    lengths = np.asarray([len(ids) for ids in collected.ids], dtype=np.int64)
    packed = packing.pack(lengths, data.max_length) if data.packing else packing.one_per_row(len(lengths))
    rows = [packed.order[a:b] for a, b in itertools.pairwise(packed.starts)]
    if max_rows is not None and len(rows) > max_rows:
        # Rows stand by the length of their longest document: evenly spaced ones stand for all.
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, max_rows).round().astype(int)]
    order = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    docs = _starts(lengths[order])
    starts = docs[_starts(np.asarray([len(row) for row in rows], dtype=np.int64))]
    trained = _concatenate([collected.trained[i] for i in order], np.uint8)
    labels_before = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
    return Split(
        tokens=_concatenate([collected.ids[i] for i in order], np.uint32),
        trained=trained,
        rows=starts,
        docs=docs,
        row_labels=np.diff(labels_before[starts]),
    )


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of consecutive pieces starts, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)


def _samples(encoder: Encoder, documents: list[Document]) -> list[dict[str, object]]:
    """Up to NUM_SAMPLES of the held-out documents, evenly spaced, as cache.read_samples gives them."""
    picked = sorted({int(i) for i in np.linspace(0, len(documents) - 1, NUM_SAMPLES + 2)[1:-1]}) if documents else []
    found = [encoder.prompt(documents[i]) for i in picked]
    return [dict(zip(("prompt", "prompt_ids", "answer"), sample, strict=True)) for sample in found if sample is not None]


def _facts(train: _Collected, train_split: Split, eval_split: Split, data: DataSection) -> DataFacts:
    return DataFacts(
        cache_dir="",
        num_rows=train_split.num_rows,
        num_docs=train_split.num_docs,
        num_tokens=len(train_split.tokens),
        num_trained_tokens=int(train_split.row_labels.sum()),
        num_eval_rows=eval_split.num_rows,
        num_eval_tokens=len(eval_split.tokens),
        truncated_docs=train.truncated_docs,
        truncated_tokens=train.truncated_tokens,
        padding_frac=1 - len(train_split.tokens) / (train_split.num_rows * data.max_length),
    )


def _report(train: _Collected, held_out: _Collected, eval_split: Split) -> dict[str, int]:
    return {
        "dropped_docs": train.dropped_docs,
        "docs_with_turn_end": train.docs_with_turn_end,
        "num_eval_docs": eval_split.num_docs,
        "num_eval_trained_tokens": int(eval_split.row_labels.sum()),
        "eval_truncated_docs": held_out.truncated_docs,
        "eval_dropped_docs": held_out.dropped_docs,
    }
