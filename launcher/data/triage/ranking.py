"""Ranks the documents of a split that are worth checking, by the log-probabilities of their trained tokens.

A document is likely mislabeled if its prompt does not explain its answer: the answer's loss is hardly lower with the prompt than
without. By itself, the loss with the prompt would rank rare words and numbers first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from launcher.data.cache.split import Split

# Nats per token below which an answer counts as known: its tokens have probabilities of 0.9 and more.
KNOWN_LOSS = 0.1
# Shorter answers, such as a label, are not conclusive.
_MIN_KNOWN_TOKENS = 8

MISLABELED, MEMORIZED, NOTHING_TO_LEARN = "mislabeled", "memorized", "nothing_to_learn"
FINDINGS = {
    MISLABELED: "likely mislabeled: the answer is hardly more likely with its prompt than without",
    MEMORIZED: "memorized: the model repeats the answer to this prompt",
    NOTHING_TO_LEARN: "nothing to learn: the model knows the answer without its prompt",
}


@dataclass(frozen=True)
class DocumentScores:
    """For each document of a split: its trained tokens, their mean loss in nats, and without the prompt (NaN: no prompt)."""

    num_tokens: np.ndarray
    loss: np.ndarray
    loss_alone: np.ndarray

    @property
    def explained(self) -> np.ndarray:
        """The share of the answer's loss that its prompt explains, at most 1; NaN without a prompt."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return 1 - self.loss / self.loss_alone


def mean_losses(split: Split, log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of trained tokens of each document of a split, and their mean loss, NaN if there are none.

    `log_probs` are those of all trained tokens of the split, in order.
    """
    trained_before = np.concatenate([[0], np.cumsum(split.trained[:], dtype=np.int64)])
    ends = trained_before[np.asarray(split.docs)]
    sums = np.concatenate([[0.0], np.cumsum(log_probs, dtype=np.float64)])
    counts = np.diff(ends)
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts, -(sums[ends[1:]] - sums[ends[:-1]]) / counts


def rank_mislabeled(scores: DocumentScores) -> np.ndarray:
    """Return the documents with a prompt, those most likely mislabeled first."""
    order = np.argsort(scores.explained, kind="stable")
    return order[: np.count_nonzero(~np.isnan(scores.explained))]


def is_likely_mislabeled(scores: DocumentScores) -> np.ndarray:
    """Return which answers are not more likely with their prompts than without, bool [documents]."""
    with np.errstate(invalid="ignore"):
        return np.asarray(scores.explained <= 0)


def find_known(scores: DocumentScores) -> dict[str, np.ndarray]:
    """Return the documents that are memorized, and those with nothing to learn, each with the lowest loss first."""
    is_long = scores.num_tokens >= _MIN_KNOWN_TOKENS
    is_known, is_known_alone = scores.loss <= KNOWN_LOSS, scores.loss_alone <= KNOWN_LOSS
    has_prompt = ~np.isnan(scores.loss_alone)
    chosen = {
        MEMORIZED: is_long & is_known & ~is_known_alone & has_prompt,
        NOTHING_TO_LEARN: is_long & is_known_alone,
    }
    keys = {MEMORIZED: scores.loss, NOTHING_TO_LEARN: scores.loss_alone}
    return {name: np.flatnonzero(mask)[np.argsort(keys[name][mask], kind="stable")] for name, mask in chosen.items()}
