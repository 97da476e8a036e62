"""Builds the data cache: read, encode, check, mix, pack, write. Runs on CPU, once per content key."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher import collect_garbage_rarely
from launcher.config.sections.data import DataSection
from launcher.config.sections.evaluation import EvalSet
from launcher.data import cache_store, row_layout
from launcher.data.cache_store import cache_key
from launcher.data.checks import findings
from launcher.data.corpus import EncodedCorpus, Progress, read_corpus, select_documents
from launcher.data.packing import RowLayout
from launcher.data.schema import COLUMNS
from launcher.data.sources.formats import rank_keys
from launcher.data.sources.reading import check_sources, describe_origin, list_inputs, make_set_data, name_set
from launcher.data.split import write_origins
from launcher.data.tokenization.batch_encoder import NUM_PROMPTS
from launcher.data.tokenization.encoder import read_template
from launcher.errors import DataError, Problem
from launcher.plan.launch_plan import DataFacts

# As a share of the documents. A rarer last token belongs to the text of a row, not to the template.
_MIN_TURN_END_SHARE = 0.01


def build(
    data: DataSection,
    tokenizer_path: str,
    on_progress: Progress = lambda stage, done, total: None,
    num_embeddings: int | None = None,
) -> DataFacts:
    """Build the cache for `data` and the tokenizer in the folder `tokenizer_path`, unless it exists; return its facts.

    `on_progress(stage, done, total)` receives counts of documents; `total` is an upper bound. Token ids beyond `num_embeddings`
    of the model do not stop the build on their own, but are reported together with problems that do. Raises DataError if a
    source, a row or a template cannot be used, or if nothing is left to train on.
    """
    if problems := check_sources(data):
        raise DataError(problems)
    if (facts := cache_store.find_built(data, tokenizer_path)) is not None:
        return facts
    key = cache_key(data, tokenizer_path)
    with cache_store.lock_folder(key, data.cache_group) as folder:
        if folder is not None:
            _build_into(folder, data, tokenizer_path, on_progress, num_embeddings)
            if cache_key(data, tokenizer_path) != key:
                # The key describes the bytes before the change.
                message, where = "a data source changed while it was read", ", ".join(source.path for source in data.sources)
                raise DataError(message, where, remedy="try again when no program is writing to it, or pin its revision")
    facts = cache_store.find(key, data.cache_group)
    if facts is None:
        where = str(cache_store.cache_dir(key, data.cache_group))
        raise DataError("the data cache is missing or damaged right after it was built", where, remedy="try again")
    return facts


def build_eval_sets(
    eval_sets: Mapping[str, EvalSet],
    data: DataSection,
    tokenizer_path: str,
    on_progress: Progress,
    num_embeddings: int | None = None,
) -> dict[str, DataFacts]:
    """Build the caches of `eval_sets`, with rows built like those of `data`; return their facts by name. Raises DataError."""
    built: dict[str, DataFacts] = {}
    problems: list[Problem] = []
    for setting, eval_set in eval_sets.items():
        section = make_set_data(eval_set, data)
        try:
            facts = built[eval_set.name] = build(section, tokenizer_path, on_progress, num_embeddings)
            refused = findings.problems(findings.read(facts.cache_dir), section.checks)
            problems += [name_set(problem, setting, eval_set) for problem in refused]
        except DataError as error:
            problems += [name_set(problem, setting, eval_set) for problem in error.problems]
    if problems:
        raise DataError(problems)
    return built


def _build_into(folder: Path, data: DataSection, tokenizer_path: str, on_progress: Progress, num_embeddings: int | None) -> None:
    collect_garbage_rarely()
    spool = row_layout.TokenSpool(folder)
    corpus = read_corpus(data, tokenizer_path, spool, on_progress)
    docs, pieces = corpus.docs, corpus.pieces
    on_progress("compare", 0, corpus.num_docs)
    id_problem = None if num_embeddings is None else cache_store.id_problem(corpus.max_token_id, num_embeddings, tokenizer_path)
    row_problems = corpus.problems.refused(data.checks).to_list()
    problems = [*row_problems, *([id_problem] if id_problem else [])]
    try:
        selection = select_documents(corpus, data)
    except DataError as error:
        # With the rows that cannot be used, something might be left.
        if problems:
            raise DataError(problems) from error
        raise
    if row_problems:
        raise DataError([*problems, *findings.problems(selection.findings, data.checks)])
    is_dropped, layout = selection.is_dropped, selection.layout
    on_progress("compare", corpus.num_docs, corpus.num_docs)
    on_progress("pack and write", 0, 1)
    held_out_pieces = corpus.select_pieces(is_dropped, held_out=True)
    held_out = row_layout.layout_held_out(pieces.lengths, held_out_pieces, data)
    given = {
        name: np.where(np.isnan(values), COLUMNS[name].default, values)[pieces.doc]
        for name, values in docs.columns.items()
        if not np.isnan(values).all()
    }
    columns = {"source": docs.source[pieces.doc], "num_trained": pieces.labels, **given}
    tokens = spool.close()
    digest = "-".join(
        row_layout.write(split_folder, split, pieces.lengths, columns, tokens)
        for split_folder, split in ((folder, layout), (folder / "eval", held_out))
    )
    spool.remove()
    write_origins(folder, [pieces.doc[split.order] for split in (layout, held_out)], docs.wheres, docs.contents)
    candidates = (prompt for prompt in corpus.prompts if not is_dropped[prompt.doc])
    chosen = heapq.nsmallest(NUM_PROMPTS, candidates, key=lambda prompt: prompt.rank)
    samples = [{"prompt": p.prompt, "prompt_ids": p.prompt_ids, "answer": p.answer} for p in chosen]
    cache_store.write_json(folder / "samples.json", samples)
    findings.write(folder, selection.findings)
    report = _make_report(corpus, is_dropped, layout, held_out, selection.epochs, data)
    if data.exclude is not None:
        report["num_excluded"] = selection.num_excluded
    row_tokens = np.add.reduceat(pieces.lengths[layout.order], layout.starts[:-1])
    num_tokens = int(row_tokens.sum())
    facts = DataFacts(
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
        columns=tuple(given),
        turn_end_ids=tuple(report["turn_end_ids"]),
        chat_template=read_template(data),
    )
    cache_store.finish(folder, facts, report)
    on_progress("pack and write", 1, 1)


def _make_report(
    corpus: EncodedCorpus,
    is_dropped: np.ndarray,
    layout: RowLayout,
    held_out: RowLayout,
    epochs: Sequence[float],
    data: DataSection,
) -> dict[str, Any]:
    """Count documents and tokens for the report; `is_dropped` is bool [documents].

    `read` counts documents as they were read, `num_docs` documents in the rows. `dropped` were dropped by a check or for their
    length. `unused` are left out by the mixture or data.eval_max_rows. Of the documents in rows, `truncated` lost tokens and
    `split` have several pieces.
    """
    docs, pieces = corpus.docs, corpus.pieces
    gone = is_dropped | (docs.num_pieces == 0)
    cut = (docs.lost_tokens > 0) & (docs.num_pieces > 0)
    used = np.bincount(pieces.doc[layout.order], minlength=corpus.num_docs) > 0
    evaluated = np.bincount(pieces.doc[held_out.order], minlength=corpus.num_docs) > 0
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
        "held_out_unused": docs.held_out & ~gone & filled & ~evaluated,
        "held_out_truncated_docs": docs.held_out & cut,
    }
    inputs = list_inputs(data)

    def count(sources: np.ndarray, weights: np.ndarray | None = None) -> list[int]:
        return list(np.bincount(sources, weights, len(inputs)).astype(int).tolist())

    in_rows = docs.source[pieces.doc[layout.order]]
    by_source: dict[str, list[Any]] = {key: count(docs.source[chosen]) for key, chosen in counted.items()}
    by_source["truncated_tokens"] = count(docs.source, np.where(used & cut, docs.lost_tokens, 0))
    by_source["num_docs"] = count(in_rows)
    by_source["num_tokens"] = count(in_rows, pieces.lengths[layout.order])
    by_source["docs_with_turn_end"] = count(in_rows, pieces.turn_end[layout.order])
    by_source["epochs"] = [*epochs, *[0.0] * (len(inputs) - len(epochs))]
    per_source = [
        {
            "name": source.name,
            "path": source.path,
            **describe_origin(source),
            **{key: values[i] for key, values in by_source.items()},
            **rank_keys(corpus.unread_keys[i]),
            "completions": int(corpus.completions[i, 0]),
            "completions_as_chat": int(corpus.completions[i, 1]),
        }
        for i, source in enumerate(inputs)
    ]
    # Of the last trained turns: earlier ones may end with another token that more text follows. The most frequent comes first.
    end_ids, counts = np.unique(docs.turn_end[used & (docs.turn_end >= 0)], return_counts=True)
    is_common = counts >= _MIN_TURN_END_SHARE * counts.sum()
    end_ids = end_ids[is_common][np.argsort(-counts[is_common], kind="stable")]
    return {
        "sources": per_source,
        "dropped_docs": sum(by_source["dropped"]),
        "turn_end_ids": end_ids.tolist(),
        "num_eval_docs": len(held_out.order),
        "max_token_id": corpus.max_token_id,
    }
