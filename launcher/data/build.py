"""Building the data cache: read, encode, check, mix, pack, write. Runs on CPU, once per content key."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from launcher.config.data import DataSection, Source
from launcher.data import cache, mixture, row_layout, sources
from launcher.data.checks import findings, overlap, quality
from launcher.data.sources.keys import KeyCounts
from launcher.data.tokenization import parallel
from launcher.data.tokenization.batch_encoder import NUM_SAMPLES, Docs, Pieces, Sample, Work
from launcher.data.tokenization.encoder import read_template
from launcher.errors import DataError, Problem
from launcher.plan.launch_plan import DataFacts

# Of the documents; what is rarer is the end of some row's own text.
_SHARE_OF_TURN_END = 0.01
# A few of them may yet be dropped.
_SPARE_SAMPLES = 16 * NUM_SAMPLES

Progress = Callable[[str, int, int], None]
Columns = TypeVar("Columns", Docs, Pieces)


@dataclass(frozen=True)
class _Corpus:
    """All documents that were read, and the pieces that they became."""

    docs: Docs
    pieces: Pieces
    hits: list[tuple[int, quality.Hit]]
    samples: list[Sample]
    max_token_id: int
    unread_keys: list[KeyCounts]

    @property
    def num_docs(self) -> int:
        return len(self.docs.wheres)

    def kept(self, drop: np.ndarray, held_out: bool) -> np.ndarray:
        """Numbers of the pieces of one split that are left without the documents in `drop`, bool [documents]."""
        pieces = self.pieces
        return np.flatnonzero(~drop[pieces.doc] & (pieces.lengths > 0) & (self.docs.held_out[pieces.doc] == held_out))


@dataclass(frozen=True)
class _Mixed:
    """Which documents are dropped, bool [documents], the rows of training, passes over each source, and what was found."""

    drop: np.ndarray
    layout: row_layout.Layout
    epochs: list[float]
    found: findings.Findings


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
            if cache.cache_key(data, tokenizer_path) != key:
                # What was read would stand under the name of other bytes.
                what, where = "a data source changed while it was read", ", ".join(source.path for source in data.sources)
                raise DataError(Problem(what, where, remedy="try again when nothing writes to it any more, or pin its revision"))
    facts = cache.find(key)
    if facts is None:
        raise DataError(Problem("the data cache vanished while it was built", str(cache.cache_dir(key)), remedy="try again"))
    return facts


def _build_into(folder: Path, data: DataSection, tokenizer_path: str, on_progress: Progress) -> None:
    spill = row_layout.Spill(folder)
    corpus = _collected(data, tokenizer_path, spill, on_progress)
    docs, pieces = corpus.docs, corpus.pieces
    on_progress("compare", 0, corpus.num_docs)
    mixed = _mixed(corpus, data)
    drop, layout = mixed.drop, mixed.layout
    on_progress("compare", corpus.num_docs, corpus.num_docs)
    on_progress("pack and write", 0, 1)
    held_out = row_layout.all_of(pieces.lengths, corpus.kept(drop, held_out=True), data, data.eval_max_rows)
    piece_sources = docs.source[pieces.doc]
    spilled = spill.close()
    num_inputs = len(data.sources) + (data.eval_path is not None)
    digest = "-".join(
        row_layout.write(place, split, pieces.lengths, piece_sources, pieces.labels, spilled, num_sources)
        for place, split, num_sources in ((folder, layout, len(data.sources)), (folder / "eval", held_out, num_inputs))
    )
    spill.remove()
    chosen = heapq.nsmallest(NUM_SAMPLES, (s for s in corpus.samples if not drop[s.doc]), key=lambda sample: sample.rank)
    samples = [{"prompt": s.prompt, "prompt_ids": s.prompt_ids, "answer": s.answer} for s in chosen]
    cache.write_json(folder / "samples.json", samples)
    findings.write(folder, mixed.found)
    report = _report(corpus, drop, layout, held_out, mixed.epochs, data)
    facts = _facts(report, pieces, layout, held_out, digest).model_copy(update={"chat_template": read_template(data)})
    cache.finish(folder, facts, report)
    on_progress("pack and write", 1, 1)


def _work(data: DataSection) -> Iterator[Work]:
    """All documents once; where data.eval_path is set, the sources' own held-out documents belong to neither split."""
    held_out = sources.eval_source(data)
    for number, source in enumerate(data.sources):
        if not source.is_read:
            continue
        for batch in sources.read_batches(source):
            yield Work(batch, number, None if held_out is None else False)
    if held_out is not None:
        for batch in sources.read_batches(held_out):
            yield Work(batch, len(data.sources), True)


def _inputs(data: DataSection) -> list[Source]:
    held_out = sources.eval_source(data)
    return [*data.sources, *([held_out] if held_out is not None else [])]


def _names(data: DataSection) -> tuple[str, ...]:
    return tuple(source.name for source in _inputs(data))


def _collected(data: DataSection, tokenizer_path: str, spill: row_layout.Spill, on_progress: Progress) -> _Corpus:
    """Read and encode all documents; their tokens go to `spill`."""
    total = sum(sources.count_rows(source) for source in _inputs(data) if source.is_read)
    on_progress("tokenise", 0, total)
    docs: list[Docs] = []
    pieces: list[Pieces] = []
    hits: list[tuple[int, quality.Hit]] = []
    samples: list[Sample] = []
    num_docs = max_token_id = 0
    unread_keys = [KeyCounts() for _ in _inputs(data)]
    for batch in parallel.encode(_work(data), data, tokenizer_path):
        spill.add(batch.tokens, batch.trained)
        max_token_id = max(max_token_id, int(batch.tokens.max(initial=0)))
        unread_keys[batch.source].add(batch.unread_keys)
        hits += [(num_docs + i, hit) for i, hit in batch.hits]
        samples += [replace(sample, doc=num_docs + sample.doc) for sample in batch.samples]
        samples = heapq.nsmallest(_SPARE_SAMPLES, samples, key=lambda sample: sample.rank)
        # Of a batch as a whole the tokens would stay in memory.
        docs.append(batch.docs)
        pieces.append(_shifted(batch.pieces, num_docs))
        num_docs += len(batch.docs.wheres)
        on_progress("tokenise", num_docs, max(total, num_docs))
    on_progress("tokenise", num_docs, num_docs)
    return _Corpus(_joined(docs), _joined(pieces), hits, samples, max_token_id, unread_keys)


def _shifted(pieces: Pieces, num_docs: int) -> Pieces:
    return replace(pieces, doc=pieces.doc + num_docs)


def _joined(parts: Sequence[Columns]) -> Columns:
    """The columns of several batches, one below the other."""
    columns: dict[str, Any] = {}
    for column in fields(parts[0]):
        values = [getattr(part, column.name) for part in parts]
        columns[column.name] = list(itertools.chain(*values)) if isinstance(values[0], list) else np.concatenate(values)
    return type(parts[0])(**columns)


def _mixed(corpus: _Corpus, data: DataSection) -> _Mixed:
    """What is trained on: without what the checks drop, and of each source as much as the mixture takes.

    Errors: DataError where nothing is left to train on.
    """
    docs, pieces, checks = corpus.docs, corpus.pieces, data.checks
    hits = list(corpus.hits)
    inside, training = np.flatnonzero(docs.held_out), np.flatnonzero(~docs.held_out)

    def left(drop: np.ndarray) -> np.ndarray:
        kept = corpus.kept(drop, held_out=False)
        if not pieces.labels[kept].any():
            raise _nothing_left(docs, data, _concluded(hits, corpus, kept[:0], data))
        return kept

    def leaks(training: np.ndarray, are_dropped: bool) -> list[tuple[int, quality.Hit]]:
        found = []
        if (checks.held_out_in_train == "drop") == are_dropped:
            found += overlap.leaks(docs.contents, training, inside)
        if (checks.near_held_out_in_train == "drop") == are_dropped:
            found += overlap.near_leaks(docs.contents, docs.signatures, training, inside, checks)
        return found

    kept = left(quality.dropped(hits, corpus.num_docs, checks))
    num_tokens = np.bincount(docs.source[pieces.doc[kept]], pieces.lengths[kept], len(data.sources)).astype(int)
    # Of several copies one is kept, and it should be one that is in the rows.
    shares = np.asarray(mixture.shares(data.sources, num_tokens.tolist()))
    training = training[np.argsort(-shares[docs.source[training]], kind="stable")]
    hits += overlap.again(docs.contents, docs.tasks, docs.signatures, training, checks)
    # In place of what is dropped the mixture takes other documents, which must not be leaks either.
    hits += leaks(training, are_dropped=True)
    drop = quality.dropped(hits, corpus.num_docs, checks)
    layout, epochs = row_layout.mixed(pieces.lengths, docs.source[pieces.doc], left(drop), data)
    if not pieces.labels[layout.order].any():
        raise _nothing_left(docs, data, _concluded(hits, corpus, layout.order, data))
    hits += leaks(np.unique(pieces.doc[layout.order]), are_dropped=False)
    return _Mixed(drop, layout, epochs, _concluded(hits, corpus, layout.order, data))


def _concluded(hits: list[tuple[int, quality.Hit]], corpus: _Corpus, order: np.ndarray, data: DataSection) -> findings.Findings:
    """What is found where training has the pieces `order`."""
    docs, pieces = corpus.docs, corpus.pieces
    trained = np.bincount(pieces.doc, pieces.labels, corpus.num_docs) > 0
    used = np.bincount(pieces.doc[order], minlength=corpus.num_docs) > 0
    seen = quality.Corpus(docs.wheres, docs.source, _names(data), docs.held_out, docs.num_tokens, docs.is_text, trained, used)
    return quality.conclude(hits, seen, data.checks)


def _nothing_left(docs: Docs, data: DataSection, found: findings.Findings) -> DataError:
    dropped = [one.finding for one in findings.judge(found, data.checks) if one.action == "drop"]
    # Of what the checks or the length have dropped, there may be some to train on.
    never = all(finding.name == "no_trained_token" for finding in dropped) and bool((docs.num_pieces > 0).all())
    what = "no document with a trained token is left to train on" + (", which no setting accepts" if never else "")
    where = ", ".join(source.path for source in data.sources)
    remedy = (
        "give rows with an assistant message or a completion, raise data.max_length, lower data.eval_fraction, "
        "or let data.checks keep what it drops"
    )
    num_held_out = np.count_nonzero(docs.held_out)
    read = f"{len(docs.held_out) - num_held_out:,} documents to train on and {num_held_out:,} held-out ones were read"
    told = [f"{finding.count:,} {finding.title} ({finding.examples[0].where})" for finding in dropped]
    return DataError(Problem(what, where, "; ".join([read, *told]), remedy))


def _facts(
    report: dict[str, Any], pieces: Pieces, layout: row_layout.Layout, held_out: row_layout.Layout, digest: str
) -> DataFacts:
    row_tokens = np.add.reduceat(pieces.lengths[layout.order], layout.starts[:-1])
    num_tokens = int(row_tokens.sum())
    return DataFacts(
        cache_dir="",
        num_rows=layout.num_rows,
        num_docs=len(layout.order),
        num_tokens=num_tokens,
        num_trained_tokens=int(pieces.labels[layout.order].sum()),
        num_eval_rows=held_out.num_rows,
        num_eval_tokens=int(pieces.lengths[held_out.order].sum()),
        truncated_docs=sum(source["truncated_docs"] for source in report["sources"]),
        truncated_tokens=sum(source["truncated_tokens"] for source in report["sources"]),
        padding_frac=1 - num_tokens / (layout.num_rows * int(row_tokens.max())),
        digest=digest,
        turn_end_ids=tuple(report["turn_end_ids"]),
    )


def _turn_end_ids(turn_ends: np.ndarray) -> list[int]:
    """The tokens that end the last trained turn of documents, the most frequent first: at an earlier one more may follow."""
    ids, counts = np.unique(turn_ends[turn_ends >= 0], return_counts=True)
    common = counts >= _SHARE_OF_TURN_END * counts.sum()
    return [int(i) for i in ids[common][np.argsort(-counts[common], kind="stable")]]


def _report(
    corpus: _Corpus,
    drop: np.ndarray,
    layout: row_layout.Layout,
    held_out: row_layout.Layout,
    epochs: Sequence[float],
    data: DataSection,
) -> dict[str, Any]:
    """What is told of the cache beyond its facts; documents are counted as they were read, `num_docs` in the rows.

    `dropped`: by a check, or for its length. `unused`: the mixture takes less of its source. Of the documents in rows,
    `truncated`: tokens are in no piece; `split`: there are several pieces.
    """
    docs, pieces = corpus.docs, corpus.pieces
    gone = drop | (docs.num_pieces == 0)
    cut = (docs.lost_tokens > 0) & (docs.num_pieces > 0)
    used = np.bincount(pieces.doc[layout.order], minlength=corpus.num_docs) > 0
    filled = np.bincount(pieces.doc, pieces.lengths, corpus.num_docs) > 0
    counted = {
        "read": ~docs.held_out,
        "dropped": ~docs.held_out & gone,
        "dropped_long": ~docs.held_out & (docs.num_pieces == 0),
        "unused": ~docs.held_out & ~gone & filled & ~used,
        "truncated_docs": used & cut,
        "split_docs": used & (docs.num_pieces > 1),
        "held_out_read": docs.held_out,
        "held_out_dropped": docs.held_out & gone,
        "held_out_truncated_docs": docs.held_out & cut,
    }
    names = _names(data)
    of_source = {key: np.bincount(docs.source[chosen], minlength=len(names)).tolist() for key, chosen in counted.items()}
    lost = np.bincount(docs.source, weights=np.where(used & cut, docs.lost_tokens, 0), minlength=len(names))
    in_rows = docs.source[pieces.doc[layout.order]]
    of_source["truncated_tokens"] = lost.astype(int).tolist()
    of_source["num_docs"] = np.bincount(in_rows, minlength=len(names)).tolist()
    of_source["num_tokens"] = np.bincount(in_rows, pieces.lengths[layout.order], minlength=len(names)).astype(int).tolist()
    of_source["docs_with_turn_end"] = (
        np.bincount(in_rows, pieces.turn_end[layout.order], minlength=len(names)).astype(int).tolist()
    )
    of_source["epochs"] = [*epochs, *[0.0] * (len(names) - len(epochs))]
    inputs = _inputs(data)
    origins = [sources.provenance(source) for source in inputs]
    per_source = [
        {
            "name": source.name,
            "path": source.path,
            **origins[i],
            **{key: values[i] for key, values in of_source.items()},
            **corpus.unread_keys[i].to_json(),
        }
        for i, source in enumerate(inputs)
    ]
    return {
        "sources": per_source,
        "dropped_docs": sum(of_source["dropped"]),
        "docs_with_turn_end": sum(of_source["docs_with_turn_end"]),
        "turn_end_ids": _turn_end_ids(docs.turn_end[used]),
        "num_eval_docs": len(held_out.order),
        "num_eval_trained_tokens": int(pieces.labels[held_out.order].sum()),
        "eval_truncated_docs": sum(of_source["held_out_truncated_docs"]),
        "eval_dropped_docs": sum(of_source["held_out_dropped"]),
        "max_token_id": corpus.max_token_id,
    }
