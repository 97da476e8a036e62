"""Selects the documents to train on: without those that the checks drop, and as much of each source as the mixture takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.config.sections.data import ChecksSection, DataSection
from launcher.data import row_layout
from launcher.data.checks import overlap
from launcher.data.checks.findings import (
    CHECKS,
    LEAKS,
    NUM_EXAMPLES,
    OF_HELD_OUT,
    CheckHit,
    Example,
    Finding,
    Findings,
    get_action,
    judge,
)
from launcher.data.corpus import EncodedCorpus, list_names
from launcher.data.packing import RowLayout
from launcher.data.tokenization.batch_encoder import DocumentTable
from launcher.data.triage import read_exclusions
from launcher.errors import DataError, Problem

# Continued pre-training on fewer tokens has little effect.
FEW_TOKENS_OF_TEXT = 1_000_000
FEW_EXAMPLES = 100
_USUAL_EXAMPLES = "50 to 100 are usual for a format or a tone, 1,000 and more for a skill, tens of thousands for general chat"
_USUAL_TEXT = "continued pre-training usually takes millions of tokens or more"


@dataclass(frozen=True)
class Selection:
    """Which documents are dropped, bool [documents], the training rows, the passes over each source, and the findings.

    `num_excluded` is the number of dropped documents that data.exclude names.
    """

    is_dropped: np.ndarray
    layout: RowLayout
    epochs: list[float]
    findings: Findings
    num_excluded: int = 0


def select_documents(corpus: EncodedCorpus, data: DataSection) -> Selection:
    """Check the documents against each other, drop those that data.checks says to drop, and mix and pack the rest.

    Raises:
        DataError: if nothing is left to train on.
    """
    docs, pieces, checks = corpus.docs, corpus.pieces, data.checks
    hits = list(corpus.hits)
    is_excluded = ~docs.held_out & np.isin(docs.contents, read_exclusions(data.exclude))
    held_out, training = np.flatnonzero(docs.held_out), np.flatnonzero(~docs.held_out & ~is_excluded)

    def require_pieces(is_dropped: np.ndarray) -> np.ndarray:
        selected = corpus.select_pieces(is_dropped, held_out=False)
        if not pieces.labels[selected].any():
            raise _make_empty_error(docs, data, _collect_for_rows(hits, corpus, selected[:0], data))
        return selected

    def find_leaks(training: np.ndarray, are_dropped: bool) -> list[tuple[int, CheckHit]]:
        leaks = []
        if (checks.held_out_in_train == "drop") == are_dropped:
            leaks += overlap.find_leaks(docs.contents, training, held_out)
        if (checks.near_held_out_in_train == "drop") == are_dropped:
            leaks += overlap.find_near_leaks(docs.contents, docs.signatures, training, held_out, are_dropped)
        if (checks.held_out_prompt_in_train == "drop") == are_dropped:
            leaks += overlap.find_prompt_leaks(docs.contents, docs.prompts, docs.prompt_forms, training, held_out)
        return leaks

    selected = require_pieces(is_excluded | select_dropped(hits, corpus.num_docs, checks))
    num_tokens = np.bincount(docs.source[pieces.doc[selected]], pieces.lengths[selected], len(data.sources)).astype(int)
    # Of several copies, keep the first in this order: the one in the source of which the mixture takes the largest share.
    shares = np.asarray(row_layout.compute_shares(data.sources, num_tokens.tolist()))
    training = training[np.argsort(-shares[docs.source[training]], kind="stable")]
    hits += overlap.find_duplicates(docs.contents, docs.tasks, docs.signatures, training)
    # The mixture replaces dropped documents by others of the source, so compare all of them, not only those in rows.
    hits += find_leaks(training, are_dropped=True)
    is_dropped = is_excluded | select_dropped(hits, corpus.num_docs, checks)
    layout, epochs = row_layout.layout_training(pieces.lengths, docs.source[pieces.doc], require_pieces(is_dropped), data)
    if not pieces.labels[layout.order].any():
        raise _make_empty_error(docs, data, _collect_for_rows(hits, corpus, layout.order, data))
    hits += find_leaks(np.unique(pieces.doc[layout.order]), are_dropped=False)
    hits += find_losses(hits, docs.num_pieces, docs.lost_tokens, docs.num_tokens, checks)
    found = _collect_for_rows(hits, corpus, layout.order, data)
    return Selection(is_dropped, layout, epochs, found, int(np.count_nonzero(is_excluded)))


def _collect_for_rows(hits: list[tuple[int, CheckHit]], corpus: EncodedCorpus, order: np.ndarray, data: DataSection) -> Findings:
    """Return the findings if the training rows consist of the pieces `order`."""
    docs, pieces, names = corpus.docs, corpus.pieces, list_names(data)
    trained = np.bincount(pieces.doc, pieces.labels, corpus.num_docs) > 0
    used = np.bincount(pieces.doc[order], minlength=corpus.num_docs) > 0
    of_documents = collect_findings(
        hits, CheckedDocuments(docs.wheres, docs.source, names, docs.held_out, docs.num_tokens, docs.is_text, trained, used)
    )
    num_bad = corpus.bad_rows
    if data.checks.bad_rows != "drop" or not num_bad.any():
        return of_documents
    totals = num_bad + np.bincount(docs.source, minlength=len(num_bad))
    by_source = {name: int(count) for name, count in zip(names, num_bad, strict=True) if count}
    shown = tuple(Example(where, detail) for where, detail in corpus.problems.examples()[:NUM_EXAMPLES])
    share = float((num_bad / np.maximum(1, totals)).max())
    return (Finding("bad_rows", int(num_bad.sum()), int(totals.sum()), by_source, shown, share), *of_documents)


def _make_empty_error(docs: DocumentTable, data: DataSection, all_findings: Findings) -> DataError:
    dropped = [one.finding for one in judge(all_findings, data.checks) if one.action == "drop"]
    # Documents dropped by a check or for their length may have trained tokens, which a setting can bring back.
    never = all(finding.name == "no_trained_token" for finding in dropped) and bool((docs.num_pieces > 0).all())
    message = "no document with a trained token is left" + (", and no setting can accept this" if never else "")
    where = ", ".join(source.path for source in data.sources)
    remedy = (
        "add rows with an assistant message or a completion, raise data.max_length, lower data.eval_fraction, "
        "or set data.checks to keep what it drops"
    )
    num_held_out = np.count_nonzero(docs.held_out)
    num_read = f"{len(docs.held_out) - num_held_out:,} documents to train on and {num_held_out:,} held-out ones were read"
    reasons = [f"{finding.title}: {finding.count:,} ({finding.examples[0].where})" for finding in dropped]
    return DataError(Problem(message, where, "; ".join([num_read, *reasons]), remedy))


# From the hits of single documents to drops and findings


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
    by_name = _group_by_check(hits)
    is_dropped = np.zeros(num_docs, dtype=bool)
    for name, of_name in by_name.items():
        if get_action(name, checks) == "drop" and name != "near_duplicate":
            # Keep the held-out document, and drop the training documents like it.
            is_dropped[[i for one in of_name.values() for i in one.others] if name in LEAKS else list(of_name)] = True
    if checks.near_duplicate == "drop":
        # If a document is dropped for another reason, keep the first one like it.
        kept: set[int] = set()
        duplicates = []
        for document, hit in by_name["near_duplicate"].items():
            first = hit.others[0]
            if is_dropped[first] and not is_dropped[document] and first not in kept:
                kept.add(first)
            else:
                duplicates.append(document)
        is_dropped[duplicates] = True
    return is_dropped


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
    by_name = _group_by_check(hits)
    scopes = {**dict.fromkeys(OF_HELD_OUT, corpus.held_out), "no_turn_end": corpus.trained}
    found = []
    for name in CHECKS:
        if not (of_name := by_name.get(name)):
            continue
        documents = np.asarray(sorted(of_name))
        evenly = np.linspace(0, len(documents) - 1, NUM_EXAMPLES).round().astype(int)
        examples = []
        for i in documents[np.unique(evenly)].tolist():
            detail, others = of_name[i].detail, of_name[i].others
            if others:
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                detail = f"{detail} {corpus.wheres[others[0]]}{more}"
            examples.append(Example(corpus.wheres[i], detail))
        # The source of each document that the check looks at.
        of_source = corpus.source[scopes[name]] if name in scopes else corpus.source
        counts, totals = (np.bincount(source, minlength=len(corpus.names)) for source in (corpus.source[documents], of_source))
        highest_share = float((counts / np.maximum(1, totals)).max())
        by_source = _count_by_source(documents, corpus)
        found.append(Finding(name, len(documents), len(of_source), by_source, tuple(examples), highest_share))
    # Plain text counts by tokens, all else by examples.
    used = np.flatnonzero(corpus.used)
    no_text = np.flatnonzero(corpus.used & ~corpus.is_text)
    if len(no_text):
        is_few, detail = len(no_text) < FEW_EXAMPLES, f"{len(no_text):,} examples to train on; {_USUAL_EXAMPLES}"
    else:
        num_tokens = int(corpus.num_tokens[used].sum())
        is_few, detail = num_tokens < FEW_TOKENS_OF_TEXT, f"{num_tokens:,} tokens of text to train on; {_USUAL_TEXT}"
    documents = no_text if len(no_text) else used
    if is_few and len(documents):
        example = Example(corpus.wheres[documents[0]], detail)
        found.append(Finding("few_examples", len(documents), len(used), _count_by_source(documents, corpus), (example,)))
    return tuple(found)


def _group_by_check(hits: Iterable[tuple[int, CheckHit]]) -> dict[str, dict[int, CheckHit]]:
    """Return the first hit of each document, by check."""
    by_name: dict[str, dict[int, CheckHit]] = defaultdict(dict)
    for document, hit in hits:
        by_name[hit.finding].setdefault(document, hit)
    return by_name


def _count_by_source(documents: np.ndarray, corpus: CheckedDocuments) -> dict[str, int]:
    counts = np.bincount(corpus.source[documents], minlength=len(corpus.names))
    return {corpus.names[i]: int(count) for i, count in enumerate(counts) if count}
