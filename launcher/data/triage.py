"""Finds documents worth checking by the log-probabilities of their trained tokens; reads and writes the file of data.exclude.

A document is likely mislabeled if its prompt does not explain its answer: the answer's loss is hardly lower with the prompt than
without. By itself, the loss with the prompt would rank rare words and numbers first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from launcher.config.sections.data import DataSection
from launcher.data import row_layout
from launcher.data.split import Split
from launcher.errors import DataError
from launcher.plan.launch_plan import DataFacts
from launcher.runs import atomic_files

# Nats per token below which an answer counts as known: its tokens have probabilities of 0.9 and more.
KNOWN_LOSS = 0.1
# Shorter answers, such as a label, are not conclusive.
_MIN_KNOWN_TOKENS = 8
# The most tokens that prompts may share, and the number of prompts that are compared.
_MAX_SHARED_TOKENS, _NUM_COMPARED = 16, 1000

MISLABELED, MEMORIZED, NOTHING_TO_LEARN = "mislabeled", "memorized", "nothing_to_learn"
FINDINGS = {
    MISLABELED: "likely mislabeled: the answer is hardly more likely with its prompt than without",
    MEMORIZED: "memorized: the model repeats the answer to this prompt",
    NOTHING_TO_LEARN: "nothing to learn: the model knows the answer without its prompt",
}


def write_answers_alone(split: Split, folder: Path, data: DataSection) -> tuple[DataFacts, np.ndarray] | None:
    """Write the answers of the documents with a prompt as a split into `folder`; None if no document has one.

    Of a prompt, only the last tokens that all prompts share are kept: the template's mark of where an answer begins. Returns the
    split, and the documents' indices in `split` in its order.
    """
    tokens, trained, docs = split.tokens[:], split.trained[:], np.asarray(split.docs)
    # Trained tokens after untrained ones; a document's first token is untrained.
    begins = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0) == 1)
    owners = np.searchsorted(docs, begins, side="right") - 1
    _, first = np.unique(owners, return_index=True)
    first = first[:: max(1, len(first) // _NUM_COMPARED)]
    num_shared, most = 0, min(_MAX_SHARED_TOKENS, int((begins[first] - docs[owners[first]]).min(initial=1)))
    while num_shared < most and len(np.unique(tokens[begins[first] - num_shared - 1])) <= 1:
        num_shared += 1
    is_kept = trained.astype(bool)
    # An answer needs a token before it.
    for before in range(1, max(1, num_shared) + 1):
        # A document's first token may follow another document's answer.
        at = begins - before
        is_kept[at[at >= docs[owners]]] = True
    kept_before = np.concatenate([[0], np.cumsum(is_kept)])
    lengths = kept_before[docs[1:]] - kept_before[docs[:-1]]
    has_label = np.bincount(owners, minlength=split.num_docs) > 0
    documents = np.flatnonzero((lengths < np.diff(docs)) & has_label)
    if not len(documents):
        return None
    is_chosen = np.zeros(split.num_docs, dtype=bool)
    is_chosen[documents] = True
    is_kept &= np.repeat(is_chosen, np.diff(docs))
    sources = split.columns["source"][documents]
    facts, order = row_layout.write_documents(folder, tokens[is_kept], trained[is_kept], lengths[documents], sources, data)
    return facts, documents[order]


def compute_mean_losses(split: Split, log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each document's number of trained tokens, and mean loss in nats, NaN if there are none; `log_probs` are in order."""
    counts = split.columns["num_trained"].astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(counts)])
    sums = np.concatenate([[0.0], np.cumsum(log_probs, dtype=np.float64)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts, -(sums[ends[1:]] - sums[ends[:-1]]) / counts


def compute_explained_shares(loss: np.ndarray, loss_alone: np.ndarray) -> np.ndarray:
    """Return the share of each answer's loss that its prompt explains, at most 1; 0: likely mislabeled; NaN: no prompt."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1 - loss / loss_alone)


def rank_documents(num_tokens: np.ndarray, loss: np.ndarray, loss_alone: np.ndarray) -> dict[str, np.ndarray]:
    """Return the documents of each finding, from their trained tokens and mean losses with and without prompts (NaN: no prompt).

    MISLABELED ranks all documents with a prompt, those that it explains least first; the others begin with the lowest loss.
    """
    is_long, has_prompt = num_tokens >= _MIN_KNOWN_TOKENS, ~np.isnan(loss_alone)
    is_known_alone = loss_alone <= KNOWN_LOSS
    ranked = {
        MISLABELED: (has_prompt, compute_explained_shares(loss, loss_alone)),
        MEMORIZED: (is_long & (loss <= KNOWN_LOSS) & ~is_known_alone & has_prompt, loss),
        NOTHING_TO_LEARN: (is_long & is_known_alone, loss_alone),
    }
    return {name: np.flatnonzero(mask)[np.argsort(key[mask], kind="stable")] for name, (mask, key) in ranked.items()}


def write_exclusions(file: Path, documents: Iterable[Mapping[str, Any]]) -> None:
    """Write the file; each document has `content`, and anything else that helps a person identify it."""
    atomic_files.write_text(file, "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))


def read_exclusions(file: str | None) -> np.ndarray:
    """Return the hashes of the documents to leave out, uint64; empty without a file. Raises DataError with the line."""
    contents = []
    try:
        # Not splitlines, which also splits at U+2028 and other characters in the texts of documents.
        lines = [] if file is None else Path(file).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "write it with: python -m launcher data --scored RUN --exclude FILE"
        raise DataError(f"the file of data.exclude cannot be read: {error}", "data.exclude", file or "", remedy) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            contents.append(int(json.loads(line)["content"], 16))
        except (ValueError, KeyError, TypeError) as error:
            message = "a line of data.exclude names no document"
            remedy = 'each line is a JSON object with "content": 16 hex digits, as data --scored RUN --exclude FILE writes it'
            raise DataError(message, f"{file}:{number}", line[:100], remedy) from error
    return np.asarray(contents, dtype=np.uint64)
