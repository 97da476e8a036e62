"""The answers of a split without their prompts, packed into rows of their own.

The difference between an answer's loss with and without its prompt shows how much the prompt explains. Only the last tokens that
all prompts share are kept: they are the template's mark of where an answer begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launcher.config.sections.data import DataSection
from launcher.data import row_layout
from launcher.data.cache.split import Split
from launcher.plan.launch_plan import DataFacts

_MAX_SHARED_TOKENS = 16
# Number of prompts to compare for shared tokens.
_NUM_COMPARED = 1000


@dataclass(frozen=True)
class AnswersAlone:
    """A split of answers alone. `documents` are their indices in the split with prompts, in the order of this split."""

    facts: DataFacts
    documents: np.ndarray


def write(split: Split, folder: Path, data: DataSection) -> AnswersAlone | None:
    """Write the answers of the documents with a prompt as a split into `folder`; None if no document has one."""
    tokens, trained, docs = split.tokens[:], split.trained[:], np.asarray(split.docs)
    begins = _answer_begins(trained)
    owners = np.searchsorted(docs, begins, side="right") - 1
    _, first = np.unique(owners, return_index=True)
    shared = _num_shared(tokens, begins[first], docs[owners[first]])
    is_kept = trained.astype(bool)
    for before in range(1, shared + 1):
        # A document's first token may follow another document's answer.
        at = begins - before
        is_kept[at[at >= docs[owners]]] = True
    kept_before = np.concatenate([[0], np.cumsum(is_kept)])
    lengths = kept_before[docs[1:]] - kept_before[docs[:-1]]
    labels = np.add.reduceat(trained, docs[:-1], dtype=np.int64) if split.num_docs else np.zeros(0, np.int64)
    documents = np.flatnonzero((lengths < np.diff(docs)) & (labels > 0))
    if not len(documents):
        return None
    is_chosen = np.zeros(split.num_docs, dtype=bool)
    is_chosen[documents] = True
    is_kept &= np.repeat(is_chosen, np.diff(docs))
    sources = np.asarray(split.doc_source)[documents]
    facts, order = row_layout.write_documents(folder, tokens[is_kept], trained[is_kept], lengths[documents], sources, data)
    return AnswersAlone(facts, documents[order])


def _answer_begins(trained: np.ndarray) -> np.ndarray:
    """Return the positions of trained tokens after untrained ones; a document's first token is untrained."""
    return np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0) == 1)


def _num_shared(tokens: np.ndarray, begins: np.ndarray, doc_starts: np.ndarray) -> int:
    """Return how many tokens before the first answer all documents share, at least 1: an answer needs a token before it."""
    chosen = np.unique(np.linspace(0, len(begins) - 1, min(len(begins), _NUM_COMPARED)).round().astype(int))
    begins, doc_starts = begins[chosen], doc_starts[chosen]
    most = min(_MAX_SHARED_TOKENS, int((begins - doc_starts).min(initial=1)))
    for before in range(1, most + 1):
        if len(np.unique(tokens[begins - before])) > 1:
            return max(1, before - 1)
    return max(1, most)
