"""Selects the documents to train on: without those that the checks drop, and as much of each source as the mixture takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from launcher.config.sections.data import DataSection
from launcher.data import mixture, row_layout
from launcher.data.checks import findings, inspection, overlap, summary
from launcher.data.corpus import EncodedCorpus, list_names
from launcher.data.packing import RowLayout
from launcher.data.tokenization.batch_encoder import DocumentTable
from launcher.data.triage import read_exclusions
from launcher.errors import DataError, Problem


@dataclass(frozen=True)
class Selection:
    """Which documents are dropped, bool [documents], the training rows, the passes over each source, and the findings.

    `num_excluded` is the number of dropped documents that data.exclude names.
    """

    is_dropped: np.ndarray
    layout: RowLayout
    epochs: list[float]
    findings: findings.Findings
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
            raise _nothing_left(docs, data, _collect_findings(hits, corpus, selected[:0], data))
        return selected

    def find_leaks(training: np.ndarray, are_dropped: bool) -> list[tuple[int, inspection.CheckHit]]:
        leaks = []
        if (checks.held_out_in_train == "drop") == are_dropped:
            leaks += overlap.find_leaks(docs.contents, training, held_out)
        if (checks.near_held_out_in_train == "drop") == are_dropped:
            leaks += overlap.find_near_leaks(docs.contents, docs.signatures, training, held_out, are_dropped)
        if (checks.held_out_prompt_in_train == "drop") == are_dropped:
            leaks += overlap.find_prompt_leaks(docs.contents, docs.prompts, docs.prompt_forms, training, held_out)
        return leaks

    selected = require_pieces(is_excluded | summary.select_dropped(hits, corpus.num_docs, checks))
    num_tokens = np.bincount(docs.source[pieces.doc[selected]], pieces.lengths[selected], len(data.sources)).astype(int)
    # Of several copies, keep the first in this order: the one in the source of which the mixture takes the largest share.
    shares = np.asarray(mixture.compute_shares(data.sources, num_tokens.tolist()))
    training = training[np.argsort(-shares[docs.source[training]], kind="stable")]
    hits += overlap.find_duplicates(docs.contents, docs.tasks, docs.signatures, training)
    # The mixture replaces dropped documents by others of the source, so compare all of them, not only those in rows.
    hits += find_leaks(training, are_dropped=True)
    is_dropped = is_excluded | summary.select_dropped(hits, corpus.num_docs, checks)
    layout, epochs = row_layout.layout_training(pieces.lengths, docs.source[pieces.doc], require_pieces(is_dropped), data)
    if not pieces.labels[layout.order].any():
        raise _nothing_left(docs, data, _collect_findings(hits, corpus, layout.order, data))
    hits += find_leaks(np.unique(pieces.doc[layout.order]), are_dropped=False)
    hits += summary.find_losses(hits, docs.num_pieces, docs.lost_tokens, docs.num_tokens, checks)
    found = _collect_findings(hits, corpus, layout.order, data)
    return Selection(is_dropped, layout, epochs, found, int(np.count_nonzero(is_excluded)))


def _collect_findings(
    hits: list[tuple[int, inspection.CheckHit]], corpus: EncodedCorpus, order: np.ndarray, data: DataSection
) -> findings.Findings:
    """Return the findings if the training rows consist of the pieces `order`."""
    docs, pieces = corpus.docs, corpus.pieces
    trained = np.bincount(pieces.doc, pieces.labels, corpus.num_docs) > 0
    used = np.bincount(pieces.doc[order], minlength=corpus.num_docs) > 0
    columns = (docs.wheres, docs.source, list_names(data), docs.held_out, docs.num_tokens, docs.is_text, trained, used)
    of_documents = summary.collect_findings(hits, summary.CheckedDocuments(*columns))
    if data.checks.bad_rows == "drop" and corpus.bad_rows.any():
        num_docs = np.bincount(docs.source, minlength=len(corpus.bad_rows))
        bad = summary.make_bad_rows(corpus.problems.examples(), corpus.bad_rows, num_docs, list_names(data))
        return (bad, *of_documents)
    return of_documents


def _nothing_left(docs: DocumentTable, data: DataSection, all_findings: findings.Findings) -> DataError:
    dropped = [one.finding for one in findings.judge(all_findings, data.checks) if one.action == "drop"]
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
