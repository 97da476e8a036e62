"""The counts that a build stores with the cache: the facts for the plan, and the report for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from launcher.config.sections.data import DataSection
from launcher.data import sources
from launcher.data.corpus import EncodedCorpus, list_names
from launcher.data.packing import RowLayout
from launcher.data.sources.keys import rank_keys
from launcher.data.tokenization.batch_encoder import PieceTable
from launcher.plan.launch_plan import DataFacts

# As a share of the documents. A rarer last token belongs to the text of a row, not to the template.
_MIN_TURN_END_SHARE = 0.01


def make_facts(report: dict[str, Any], pieces: PieceTable, layout: RowLayout, held_out: RowLayout, digest: str) -> DataFacts:
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
    """Return the tokens that end the last trained turn of documents, most frequent first.

    Earlier turns may end with another token that more text follows.
    """
    ids, counts = np.unique(turn_ends[turn_ends >= 0], return_counts=True)
    common = counts >= _MIN_TURN_END_SHARE * counts.sum()
    return [int(i) for i in ids[common][np.argsort(-counts[common], kind="stable")]]


def make_report(
    corpus: EncodedCorpus,
    is_dropped: np.ndarray,
    layout: RowLayout,
    held_out: RowLayout,
    epochs: Sequence[float],
    data: DataSection,
) -> dict[str, Any]:
    """Count documents and tokens for the report; `is_dropped` is bool [documents].

    `read` counts documents as they were read, `num_docs` documents in the rows. `dropped` were dropped by a check or for their
    length. `unused` are left out because the mixture takes less of the source, or because data.eval_max_rows limits held-out
    rows. Of the documents in rows, `truncated` lost tokens and `split` have several pieces.
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
    names = list_names(data)
    by_source = {key: np.bincount(docs.source[chosen], minlength=len(names)).tolist() for key, chosen in counted.items()}
    lost = np.bincount(docs.source, weights=np.where(used & cut, docs.lost_tokens, 0), minlength=len(names))
    in_rows = docs.source[pieces.doc[layout.order]]
    by_source["truncated_tokens"] = lost.astype(int).tolist()
    by_source["num_docs"] = np.bincount(in_rows, minlength=len(names)).tolist()
    by_source["num_tokens"] = np.bincount(in_rows, pieces.lengths[layout.order], minlength=len(names)).astype(int).tolist()
    by_source["docs_with_turn_end"] = (
        np.bincount(in_rows, pieces.turn_end[layout.order], minlength=len(names)).astype(int).tolist()
    )
    by_source["epochs"] = [*epochs, *[0.0] * (len(names) - len(epochs))]
    inputs = sources.list_inputs(data)
    origins = [sources.describe_origin(source) for source in inputs]
    per_source = [
        {
            "name": source.name,
            "path": source.path,
            **origins[i],
            **{key: values[i] for key, values in by_source.items()},
            **rank_keys(corpus.unread_keys[i]),
            "completions": int(corpus.completions[i, 0]),
            "completions_as_chat": int(corpus.completions[i, 1]),
        }
        for i, source in enumerate(inputs)
    ]
    return {
        "sources": per_source,
        "dropped_docs": sum(by_source["dropped"]),
        "docs_with_turn_end": sum(by_source["docs_with_turn_end"]),
        "turn_end_ids": _turn_end_ids(docs.turn_end[used]),
        "num_eval_docs": len(held_out.order),
        "num_eval_trained_tokens": int(pieces.labels[held_out.order].sum()),
        "eval_truncated_docs": sum(by_source["held_out_truncated_docs"]),
        "eval_dropped_docs": sum(by_source["held_out_dropped"]),
        "max_token_id": corpus.max_token_id,
    }
