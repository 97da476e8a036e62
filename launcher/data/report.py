"""Reports on a data cache: counts of the mixture and each source, findings, and decoded rows with their trained parts.

No torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from launcher.config.sections.data import DataSection
from launcher.config.sections.train import TrainSection
from launcher.data import cache_store
from launcher.data.checks import findings, patterns
from launcher.data.row_layout import RowOrder
from launcher.data.split import Split
from launcher.plan.launch_plan import DataFacts
from launcher.plan.steps import single_step_warning

Decode = Callable[[list[int]], str]
# Numbers of a split, a source or a document, by their names in the report.
Numbers = dict[str, Any]

# Quantiles of the document lengths to show if no rows are requested: short enough to read, but not the shortest.
_SHOWN_QUANTILES = (0.4, 0.5, 0.6)


def report(
    facts: DataFacts,
    data: DataSection,
    decode: Decode,
    train: TrainSection,
    seed: int,
    stop_ids: Sequence[int],
    num_shown: int = 0,
    eval_sets: Mapping[str, DataFacts] | None = None,
) -> dict[str, Any]:
    """Return the counts of a cache, its findings under `data.checks`, and decoded rows of the training split, for JSON.

    Fractions are 0 to 1, lengths are in tokens. `length_histogram` counts documents per bin of up to `max_tokens` tokens.
    `padding_frac` is the share of padding in the micro-batches of the first epoch in the order of `seed`, see `_count_padding`.
    `row_tokens` is the longest row. `turn_ends` are the tokens that end trained turns; `stops` is true for those in `stop_ids`,
    at which the model stops generating. `shown` has `num_shown` evenly spaced rows, or three documents of medium length if that
    is 0, with keys, passwords, e-mail addresses and telephone numbers redacted. `eval_sets` are the caches of eval.sets by name.
    `decode` returns the text of token ids, with special tokens. Raises DataError if any block of the cache is damaged.
    """
    split, held_out = Split.open(facts), Split.open(facts, held_out=True)
    for opened in (split, held_out):
        opened.verify()
    recorded = cache_store.read_report(facts.cache_dir)
    counts = recorded["sources"]
    judged = findings.judge(findings.read(facts.cache_dir), data.checks)
    padded_rows = 0 if data.packing else train.micro_batch_size or train.global_batch_size
    slots = max(1, facts.num_tokens + int(_count_padding(split, train, seed, padded_rows).sum()))
    train_numbers, train_by_source = _count_split(split, len(counts))
    held_out_numbers, held_out_by_source = _count_split(held_out, len(counts))
    return {
        "cache_dir": facts.cache_dir,
        "cache_bytes": sum(cache_store.read_meta(facts.cache_dir)["files"].values()),
        "max_length": data.max_length,
        "row_tokens": int(np.diff(split.rows).max(initial=0)),
        "packing": data.packing,
        "padded_rows": padded_rows,
        "padding_is_most": bool(padded_rows) and train.micro_batch_size is None,
        **train_numbers,
        "fill_frac": facts.num_tokens / slots,
        "padding_frac": 1 - facts.num_tokens / slots,
        **{key: sum(source[name] for source in counts) for key, name in _COUNTED.items()},
        "excluded_documents": recorded.get("num_excluded", 0),
        "sources": _report_sources(facts, data, counts, train_by_source, held_out_by_source),
        "held_out": {
            **held_out_numbers,
            "read_documents": sum(source["held_out_read"] for source in counts),
            "dropped_documents": sum(source["held_out_dropped"] for source in counts),
            "unused_documents": sum(source["held_out_unused"] for source in counts),
            "max_rows": data.eval_max_rows,
            "truncated_documents": sum(source["held_out_truncated_docs"] for source in counts),
        },
        "warnings": [warning] if (warning := single_step_warning(train, facts.num_rows, data_ranks=None)) else [],
        "findings": [one.to_json() for one in judged],
        "refused": any(one.fatal for one in judged),
        "eval_sets": [
            {
                "name": name,
                "documents": one.num_docs,
                "rows": one.num_rows,
                "tokens": one.num_tokens,
                "read_documents": cache_store.read_report(one.cache_dir)["sources"][0]["read"],
                "trained_tokens": one.num_trained_tokens,
                "cache_dir": one.cache_dir,
            }
            for name, one in (eval_sets or {}).items()
        ],
        "turn_ends": [{"id": i, "token": decode([i]), "stops": i in stop_ids} for i in facts.turn_end_ids],
        "shown": _show_rows(split, [source["name"] for source in counts], decode, num_shown),
    }


def _report_sources(
    facts: DataFacts,
    data: DataSection,
    counts: list[Numbers],
    train_numbers: list[Numbers],
    held_out_numbers: list[Numbers],
) -> list[Numbers]:
    """Return the numbers of each source; `counts` are those that the build recorded.

    `epochs` is the number of passes in one epoch of the run. `unused_documents` are left out because of the settings in
    `limited_by`.
    """
    paths = [source.path for source in data.sources] + [data.eval_path or ""] * (len(counts) - len(data.sources))
    return [
        {
            "name": recorded["name"],
            **numbers,
            "frac": numbers["tokens"] / max(1, facts.num_tokens),
            "epochs": recorded["epochs"],
            "unused_documents": recorded["unused"],
            "limited_by": [
                name
                for source in data.sources[i : i + 1]
                for name, is_set in (
                    ("weight", source.weight is not None),
                    ("max_tokens", source.max_tokens is not None),
                    ("epochs", source.epochs % 1 != 0),
                )
                if is_set
            ],
            "path": path,
            "is_read": i >= len(data.sources) or data.sources[i].is_read,
            **{key: recorded[key] for key in _RECORDED},
            **{key: recorded[name] for key, name in _COUNTED.items()},
            "held_out": {
                "documents": held_out["documents"],
                "tokens": held_out["tokens"],
                "dropped_documents": recorded["held_out_dropped"],
                "unused_documents": recorded["held_out_unused"],
            },
        }
        for i, (path, numbers, held_out, recorded) in enumerate(zip(paths, train_numbers, held_out_numbers, counts, strict=True))
    ]


# What the build recorded of a source: the origin of its rows; row keys that no format reads, each with its number of rows, and
# the number of other such keys; prompts with a completion if the tokenizer has a chat template, and how many are written with it.
_RECORDED = (
    *("digest", "commit", "files", "num_files", "left_out", "num_left_out", "unread_keys", "num_other_unread_keys"),
    *("completions", "completions_as_chat"),
)
# Names in the report, and the names under which the build recorded the counts.
_COUNTED = {
    "read_documents": "read",
    "dropped_documents": "dropped",
    "too_long_documents": "dropped_long",
    "truncated_documents": "truncated_docs",
    "truncated_tokens": "truncated_tokens",
    "split_documents": "split_docs",
    "documents_with_turn_end": "docs_with_turn_end",
}


def _count_split(split: Split, num_sources: int) -> tuple[Numbers, list[Numbers]]:
    """Return the numbers for all documents of a split, and for the documents of each source."""
    lengths, trained, source = np.diff(split.docs), split.columns["num_trained"], split.columns["source"].astype(np.int64)
    row_of = np.repeat(np.arange(split.num_rows), np.diff(np.searchsorted(split.docs, split.rows)))
    rows = np.bincount(np.unique(row_of * num_sources + source) % num_sources, minlength=num_sources).tolist()
    each = [{"rows": rows[i], **_describe_documents(lengths[source == i], trained[source == i])} for i in range(num_sources)]
    return {"rows": split.num_rows, **_describe_documents(lengths, trained)}, each


def _count_padding(split: Split, train: TrainSection, seed: int, padded_rows: int) -> np.ndarray:
    """Return the padding of each row, int64 [rows]: with packing, up to the longest of all rows, else of its `padded_rows` rows.

    `padded_rows` is the micro-batch size if it is set. If the plan chooses it, it is the global batch size, an upper bound.
    """
    lengths = np.diff(split.rows)
    if not padded_rows:
        return np.asarray(lengths.max(initial=0) - lengths)
    order = RowOrder(split.num_rows, seed, lengths, train.global_batch_size).at(0, split.num_rows)
    starts = np.arange(0, split.num_rows, padded_rows)
    widths = np.maximum.reduceat(lengths[order], starts)
    padding = np.empty_like(lengths)
    padding[order] = np.repeat(widths, np.diff([*starts, split.num_rows])) - lengths[order]
    return padding


def _describe_documents(lengths: np.ndarray, trained: np.ndarray) -> Numbers:
    """Return the numbers for documents of `lengths` tokens, of which `trained` are trained, with a histogram per power of two."""
    tokens = int(lengths.sum())
    spread, histogram = None, []
    if len(lengths):
        at = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
        spread = {**{name: int(np.quantile(lengths, q)) for name, q in at.items()}, "mean": float(lengths.mean())}
        exponents = np.ceil(np.log2(lengths)).astype(int)
        counts = np.bincount(exponents)
        histogram = [{"max_tokens": 1 << e, "documents": int(counts[e])} for e in range(exponents.min(), len(counts))]
    return {
        "documents": len(lengths),
        "tokens": tokens,
        "trained_tokens": int(trained.sum()),
        "trained_frac": int(trained.sum()) / max(1, tokens),
        "document_tokens": spread,
        "length_histogram": histogram,
    }


def _show_rows(split: Split, names: list[str], decode: Decode, num_rows: int) -> list[Numbers]:
    """Return rows, or single documents, each as documents of trained and untrained parts."""
    if num_rows:
        rows = np.unique(np.linspace(0, split.num_rows - 1, num_rows).round().astype(int)).tolist()
        spans = [(row, *np.searchsorted(split.docs, (split.rows[row], split.rows[row + 1]))) for row in rows]
    else:
        by_length = np.argsort(np.diff(split.docs), kind="stable")
        picked = sorted({int(by_length[int(q * (split.num_docs - 1))]) for q in _SHOWN_QUANTILES})
        spans = [(int(np.searchsorted(split.rows, split.docs[doc], side="right")) - 1, doc, doc + 1) for doc in picked]

    def show_document(doc: int) -> Numbers:
        span = slice(split.docs[doc], split.docs[doc + 1])
        tokens, trained = split.tokens[span], split.trained[span]
        offsets = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
        # Some tokenizers drop the first space of a text, so each part is decoded after the token before it.
        texts = [
            decode(tokens[max(0, start - 1) : end].tolist())[len(decode(tokens[max(0, start - 1) : start].tolist())) :]
            for start, end in itertools.pairwise(offsets)
        ]
        redacted = patterns.redact(texts)
        parts = [{"trained": bool(trained[a]), "text": text} for a, text in zip(offsets, redacted, strict=False)]
        return {"source": names[split.columns["source"][doc]], "tokens": len(tokens), "parts": parts}

    return [
        {"row": row, "whole": bool(num_rows), "documents": [show_document(doc) for doc in range(first, last)]}
        for row, first, last in spans
    ]
