"""Accuracy from the log-likelihoods of choices, as lm-evaluation-harness computes it. Pure, and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launcher.evaluate.choices.questions import ChoiceQuestion
from launcher.evaluate.statistics import Scores

# Names of the metrics; the first one decides.
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class ScoredChoices:
    """The log-likelihood of each choice of a question, and the indices of the chosen ones.

    `chosen_norm` is chosen by the log-likelihood divided by the number of characters of the choice, which does not favor short
    choices. In a tie, the first choice wins.
    """

    where: str
    answer: int
    log_likelihoods: tuple[float, ...]
    chosen: int
    chosen_norm: int


def choose(question: ChoiceQuestion, log_likelihoods: Sequence[float]) -> ScoredChoices:
    """Return the most likely choices of a question."""
    lengths = np.array([len(choice) for choice in question.choices], dtype=np.float64)
    values = np.asarray(log_likelihoods, dtype=np.float64)
    return ScoredChoices(
        question.where,
        question.answer,
        tuple(float(value) for value in values),
        int(np.argmax(values)),
        int(np.argmax(values / lengths)),
    )


def score(metric: str, scored: Sequence[ScoredChoices]) -> Scores:
    """Return 1 for each question whose right choice was chosen, else 0."""
    chosen = [one.chosen if metric == METRICS[0] else one.chosen_norm for one in scored]
    return np.array([index == one.answer for index, one in zip(chosen, scored, strict=True)], dtype=np.float64)
