"""Scores of documents that are not part of a run's data, such as current prompts or a question's choices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from launcher.data import row_layout
from launcher.data.cache.split import Split
from launcher.plan.launch_plan import LaunchPlan
from launcher.worker.scoring.passes import Progress, ScorePass, score, temporary_folder
from launcher.worker.scoring.weights import ScoredWeights


@dataclass(frozen=True)
class ScoredDocument:
    """Token ids, and which of them are scored. The first token is not scored, because nothing precedes it."""

    tokens: tuple[int, ...]
    is_scored: tuple[bool, ...]

    @classmethod
    def of(cls, tokens: Sequence[int], begin: int, end: int | None = None) -> ScoredDocument:
        """Return a document whose tokens from `begin` to `end` are scored."""
        end = len(tokens) if end is None else end
        return cls(tuple(tokens), tuple(i > 0 and begin <= i < end for i in range(len(tokens))))


@dataclass(frozen=True)
class DocumentGroup:
    """The documents of one pass, each with at least one scored token. `title` describes them in progress output."""

    title: str
    documents: Sequence[ScoredDocument]


def score_documents(
    plan: LaunchPlan, weights: ScoredWeights, groups: Sequence[DocumentGroup], on_progress: Progress, num_ranks: int | None = None
) -> list[list[np.ndarray]]:
    """Return the log-probabilities of the scored tokens of each document in each group. Stored scores are not recomputed.

    Raises whatever `score` raises.
    """
    with ExitStack() as stack:
        written = []
        for group in groups:
            documents = group.documents
            facts, order = row_layout.write_documents(
                stack.enter_context(temporary_folder()),
                np.concatenate([np.asarray(one.tokens, np.uint32) for one in documents]),
                np.concatenate([np.asarray(one.is_scored, np.uint8) for one in documents]),
                np.array([len(one.tokens) for one in documents], np.int64),
                np.zeros(len(documents), np.int64),
                plan.config.data,
            )
            written.append((ScorePass(title=group.title, facts=facts), order))
        scores = score(plan, weights, [one for one, _ in written], on_progress, num_ranks)
        return [
            _in_order(one.open(), order, log_probs) for (one, order), log_probs in zip(written, scores.log_probs, strict=True)
        ]


def _in_order(split: Split, order: np.ndarray, log_probs: np.ndarray) -> list[np.ndarray]:
    """Split the log-probabilities by document, in the order in which the documents were given."""
    num_scored = np.add.reduceat(split.trained[:], np.asarray(split.docs)[:-1], dtype=np.int64)
    parts = np.split(np.asarray(log_probs), np.cumsum(num_scored)[:-1])
    by_document = dict(zip(order.tolist(), parts, strict=True))
    return [by_document[i] for i in range(len(order))]
