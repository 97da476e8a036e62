"""What is in a data cache, in numbers and in a few documents whose trained parts a person can see."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from launcher.data.cache import Split, read_report
from launcher.data.chat import load_tokenizer
from launcher.plan.launch_plan import DataFacts

TRAINED_MARKS = ("⟦", "⟧")


def report(facts: DataFacts, tokenizer_path: str, num_examples: int = 3) -> dict[str, Any]:
    """JSON-able numbers of the cache and `num_examples` decoded documents of the training split.

    Fractions are 0 to 1; `length_histogram` counts documents per length bin of up to `max_tokens` tokens.
    """
    split = Split.open(facts.cache_dir)
    counted = read_report(facts.cache_dir)
    lengths = np.diff(split.docs)
    return {
        "cache_dir": facts.cache_dir,
        "rows": facts.num_rows,
        "documents": facts.num_docs,
        "tokens": facts.num_tokens,
        "trained_tokens": facts.num_trained_tokens,
        "trained_frac": facts.num_trained_tokens / facts.num_tokens,
        "fill_frac": 1 - facts.padding_frac,
        "padding_frac": facts.padding_frac,
        "document_tokens": {
            "min": int(lengths.min()),
            "median": int(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "length_histogram": _histogram(lengths),
        "truncated_documents": facts.truncated_docs,
        "truncated_tokens": facts.truncated_tokens,
        "dropped_documents": counted["dropped_docs"],
        "documents_with_turn_end": counted["docs_with_turn_end"],
        "held_out": {
            "rows": facts.num_eval_rows,
            "documents": counted["num_eval_docs"],
            "tokens": facts.num_eval_tokens,
            "trained_tokens": counted["num_eval_trained_tokens"],
            "truncated_documents": counted["eval_truncated_docs"],
            "dropped_documents": counted["eval_dropped_docs"],
        },
        "examples": _examples(split, tokenizer_path, num_examples),
    }


def render(report: dict[str, Any]) -> str:
    """The report as plain text; the trained parts of the examples stand between TRAINED_MARKS."""
    held_out, per_doc = report["held_out"], report["document_tokens"]
    lines = [
        f"rows              {report['rows']:,}, filled to {report['fill_frac']:.2%} ({report['padding_frac']:.2%} padding)",
        f"documents         {report['documents']:,}",
        f"tokens            {report['tokens']:,}",
        f"trained tokens    {report['trained_tokens']:,} ({report['trained_frac']:.1%})",
        f"document length   {per_doc['min']:,} to {per_doc['max']:,} tokens, median {per_doc['median']:,}",
        f"truncated         {report['truncated_documents']:,} documents, {report['truncated_tokens']:,} tokens lost",
        f"dropped           {report['dropped_documents']:,} documents without a trained token",
        f"end of turn       trained in {report['documents_with_turn_end']:,} of {report['documents']:,} documents",
        f"held out          {held_out['rows']:,} rows, {held_out['documents']:,} documents, {held_out['tokens']:,} tokens",
        f"cache             {report['cache_dir']}",
        "",
        "tokens per document",
    ]
    most = max(bin_["documents"] for bin_ in report["length_histogram"])
    for bin_ in report["length_histogram"]:
        bar = "█" * -(-40 * bin_["documents"] // most)
        lines.append(f"  up to {bin_['max_tokens']:>7,}  {bin_['documents']:>9,}  {bar}")
    opening, closing = TRAINED_MARKS
    for number, example in enumerate(report["examples"], start=1):
        text = "".join(f"{opening}{part['text']}{closing}" if part["trained"] else part["text"] for part in example)
        lines += ["", f"document {number} (trained between {opening} and {closing})", text]
    return "\n".join(lines)


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents per power of two of tokens, without the empty bins at both ends."""
    exponents = np.ceil(np.log2(lengths)).astype(int)
    counts = np.bincount(exponents)
    return [{"max_tokens": 1 << e, "documents": int(counts[e])} for e in range(exponents.min(), len(counts))]


def _examples(split: Split, tokenizer_path: str, number: int) -> list[list[dict[str, Any]]]:
    """Evenly spaced documents as runs of trained and untrained text."""
    tokenizer = load_tokenizer(tokenizer_path)
    examples = []
    for doc in sorted({int(i) for i in np.linspace(0, split.num_docs - 1, number + 2)[1:-1]}):
        span = slice(split.docs[doc], split.docs[doc + 1])
        tokens, trained = split.tokens[span], split.trained[span]
        borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
        examples.append(
            [
                {"trained": bool(trained[a]), "text": tokenizer.decode(tokens[a:b].tolist())}
                for a, b in itertools.pairwise(borders)
            ]
        )
    return examples
