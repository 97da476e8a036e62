"""Summarizes the hits of all documents: which documents are dropped, and the findings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.config.sections.data import ChecksSection
from launcher.data.checks.findings import CHECKS, LEAKS, NUM_EXAMPLES, OF_HELD_OUT, Example, Finding, Findings, get_action
from launcher.data.checks.inspection import CheckHit

# Continued pre-training on fewer tokens has little effect.
FEW_TOKENS_OF_TEXT = 1_000_000
FEW_EXAMPLES = 100
_USUAL_EXAMPLES = "50 to 100 are usual for a format or a tone, 1,000 and more for a skill, tens of thousands for general chat"
_USUAL_TEXT = "continued pre-training usually takes millions of tokens or more"


@dataclass(frozen=True)
class CheckedDocuments:
    """All documents in reading order, one entry each; `source` indexes `names`.

    `trained`: a piece in a row has a trained token. `used`: a training row holds the document.
    """

    wheres: Sequence[str]
    source: np.ndarray
    names: tuple[str, ...]
    held_out: np.ndarray
    num_tokens: np.ndarray
    is_text: np.ndarray
    trained: np.ndarray
    used: np.ndarray


def select_dropped(hits: Iterable[tuple[int, CheckHit]], num_docs: int, checks: ChecksSection) -> np.ndarray:
    """Return which documents the settings drop, bool [documents]; `hits` are (document, hit)."""
    by_name = _by_name(hits)
    is_dropped = np.zeros(num_docs, dtype=bool)
    for name, of_name in by_name.items():
        if get_action(name, checks) == "drop" and name != "near_duplicate":
            # Keep the held-out document, and drop the training documents like it.
            is_dropped[[i for one in of_name.values() for i in one.others] if name in LEAKS else list(of_name)] = True
    if checks.near_duplicate == "drop":
        is_dropped[_select_near_duplicates(by_name["near_duplicate"], is_dropped)] = True
    return is_dropped


def _select_near_duplicates(hits: dict[int, CheckHit], is_dropped: np.ndarray) -> list[int]:
    """Return the near duplicates to drop; if a document is dropped for another reason, keep the first one like it."""
    kept_documents: set[int] = set()
    duplicates = []
    for document, hit in hits.items():
        first = hit.others[0]
        if is_dropped[first] and not is_dropped[document] and first not in kept_documents:
            kept_documents.add(first)
        else:
            duplicates.append(document)
    return duplicates


def find_losses(
    hits: Iterable[tuple[int, CheckHit]], num_pieces: np.ndarray, lost: np.ndarray, num_tokens: np.ndarray, checks: ChecksSection
) -> list[tuple[int, CheckHit]]:
    """Find documents that are truncated or left out, as (document, hit); `hits` are those of the other checks.

    The arrays are int64 [documents]: the pieces of a document, its tokens that are in no piece, and all of its tokens. Documents
    that are left out because they resemble others do not count as losses.
    """
    reasons: dict[int, str] = {}
    for document, hit in hits:
        if not hit.others and get_action(hit.finding, checks) == "drop":
            reasons.setdefault(document, f"dropped by the check {hit.finding}")
    for document in np.flatnonzero((num_pieces == 0) & (num_tokens > 0)).tolist():
        reasons.setdefault(document, f"{num_tokens[document]:,} tokens, more than a row has")
    cut = [document for document in np.flatnonzero((lost > 0) & (num_pieces > 0)).tolist() if document not in reasons]
    return [
        *((i, CheckHit("truncated", f"{lost[i]:,} of {num_tokens[i]:,} tokens are cut off")) for i in cut),
        *((i, CheckHit("dropped", reason)) for i, reason in sorted(reasons.items())),
    ]


def collect_findings(hits: Iterable[tuple[int, CheckHit]], corpus: CheckedDocuments) -> Findings:
    """Return the findings of all checks, with counts and examples; `hits` are (document, hit)."""
    by_name = _by_name(hits)
    scopes = {**dict.fromkeys(OF_HELD_OUT, corpus.held_out), "no_turn_end": corpus.trained}
    findings = []
    for name in CHECKS:
        if of_name := by_name.get(name):
            of_source = corpus.source[scopes[name]] if name in scopes else corpus.source
            findings.append(_make_finding(name, np.asarray(sorted(of_name)), of_source, of_name, corpus))
    return tuple(findings + _check_amount(corpus))


def make_bad_rows(
    examples: Sequence[tuple[str, str]], num_bad: np.ndarray, num_docs: np.ndarray, names: Sequence[str]
) -> Finding:
    """Return the finding for rows that were left out because they cannot be used.

    `examples` are places with the problem there. For each of the sources `names`, `num_bad` counts its unusable rows, and
    `num_docs` its usable documents.
    """
    totals = num_bad + num_docs
    by_source = {name: int(count) for name, count in zip(names, num_bad, strict=True) if count}
    shown = tuple(Example(where, detail) for where, detail in examples[:NUM_EXAMPLES])
    share = float((num_bad / np.maximum(1, totals)).max())
    return Finding("bad_rows", int(num_bad.sum()), int(totals.sum()), by_source, shown, share)


def _by_name(hits: Iterable[tuple[int, CheckHit]]) -> dict[str, dict[int, CheckHit]]:
    """Return the first hit of each document, by check."""
    by_name: dict[str, dict[int, CheckHit]] = defaultdict(dict)
    for document, hit in hits:
        by_name[hit.finding].setdefault(document, hit)
    return by_name


def _make_finding(
    name: str, documents: np.ndarray, of_source: np.ndarray, hits: dict[int, CheckHit], corpus: CheckedDocuments
) -> Finding:
    """Create a finding from the hits; `of_source` is the source of each document that the check looks at."""
    evenly = np.linspace(0, len(documents) - 1, NUM_EXAMPLES).round().astype(int)
    examples = []
    for i in documents[np.unique(evenly)].tolist():
        detail, others = hits[i].detail, hits[i].others
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            detail = f"{detail} {corpus.wheres[others[0]]}{more}"
        examples.append(Example(corpus.wheres[i], detail))
    counts, totals = (np.bincount(source, minlength=len(corpus.names)) for source in (corpus.source[documents], of_source))
    shares = counts / np.maximum(1, totals)
    by_source = _by_source(documents, corpus)
    return Finding(name, len(documents), len(of_source), by_source, tuple(examples), float(shares.max()))


def _by_source(documents: np.ndarray, corpus: CheckedDocuments) -> dict[str, int]:
    counts = np.bincount(corpus.source[documents], minlength=len(corpus.names))
    return {corpus.names[i]: int(count) for i, count in enumerate(counts) if count}


def _check_amount(corpus: CheckedDocuments) -> list[Finding]:
    """Return the finding few_examples if there is little data to train on: plain text counts by tokens, all else by examples."""
    examples = np.flatnonzero(corpus.used & ~corpus.is_text)
    documents = examples if len(examples) else np.flatnonzero(corpus.used)
    num_tokens = int(corpus.num_tokens[documents].sum())
    if len(examples):
        is_few, detail = len(examples) < FEW_EXAMPLES, f"{len(examples):,} examples to train on; {_USUAL_EXAMPLES}"
    else:
        is_few, detail = num_tokens < FEW_TOKENS_OF_TEXT, f"{num_tokens:,} tokens of text to train on; {_USUAL_TEXT}"
    if not is_few or not len(documents):
        return []
    example = Example(corpus.wheres[documents[0]], detail)
    return [Finding("few_examples", len(documents), int(corpus.used.sum()), _by_source(documents, corpus), (example,))]
