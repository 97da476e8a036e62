"""Compares prompts with those of training: the figures, and the verdict in one sentence. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launcher.evaluate.drift.features import (
    TokenWeights,
    near_duplicate_share,
    nearest_similarities,
    scripts,
    unseen_share,
)
from launcher.evaluate.drift.likelihood import PromptLikelihoods
from launcher.evaluate.drift.two_sample import kolmogorov_smirnov_p_value, mmd_p_value

# Significance level of all tests together.
SIGNIFICANCE = 0.01
# A difference that a test detects with many prompts may be too small to matter.
MAX_UNUSUAL, MAX_LENGTH_CHANGE = 0.10, 0.25
# A prompt is unusual if only this share of the training prompts is farther from its nearest training prompt.
_RARE = 0.05
_NUM_FARTHEST = 5
_MAX_TEXT_CHARS = 200


@dataclass(frozen=True)
class Prompt:
    """A prompt as in training: its place, its decoded text, its tokens, and the part that a person wrote."""

    where: str
    text: str
    tokens: tuple[int, ...]
    shown: str = ""


@dataclass(frozen=True)
class FarPrompt:
    """A prompt unlike any training prompt; `similarity` is the cosine with the nearest one."""

    where: str
    similarity: float
    text: str


@dataclass(frozen=True)
class DriftReport:
    """How prompts compare with those of training.

    `words_p_value` and `length_p_value` are from the two tests. `unusual` is the share of prompts that are farther from every
    training prompt than 95% of training prompts are from one another. `unseen` is the share of their tokens that occur in no
    training prompt, along with the same share for one half of the training prompts against the other. `scripts` are shares in
    training, and now. `likelihoods` is None if no model has scored the prompts.
    """

    has_drifted: bool
    sentence: str
    num_prompts: int
    num_training: int
    words_p_value: float
    length_p_value: float
    median_tokens: tuple[float, float]
    unusual: float
    unseen: tuple[float, float]
    near_duplicates: float
    scripts: dict[str, tuple[float, float]]
    farthest: tuple[FarPrompt, ...]
    likelihoods: PromptLikelihoods | None = None


def compare(prompts: Sequence[Prompt], training: Sequence[Prompt], likelihoods: PromptLikelihoods | None = None) -> DriftReport:
    """Compare prompts with training prompts; both are random samples, and `likelihoods` covers both."""
    tokens, known = [one.tokens for one in prompts], [one.tokens for one in training]
    weights = TokenWeights(known)
    vectors, training_vectors = weights.vectors(tokens), weights.vectors(known)
    similarities = nearest_similarities(vectors, training_vectors)
    usual = np.quantile(nearest_similarities(training_vectors, training_vectors, without_self=True), _RARE)
    lengths, training_lengths = (np.array([len(one) for one in side], dtype=np.float64) for side in (tokens, known))
    words_p_value = mmd_p_value(vectors, training_vectors)
    length_p_value = kolmogorov_smirnov_p_value(lengths, training_lengths)
    unusual = float((similarities < usual).mean())
    medians = float(np.median(training_lengths)), float(np.median(lengths))
    half = len(training) // 2
    now, before = scripts([one.text for one in prompts]), scripts([one.text for one in training])
    order = np.argsort(similarities, kind="stable")[:_NUM_FARTHEST]
    has_drifted, sentence = _judge(words_p_value, length_p_value, unusual, medians, likelihoods)
    return DriftReport(
        has_drifted,
        sentence,
        len(prompts),
        len(training),
        words_p_value,
        length_p_value,
        medians,
        unusual,
        (unseen_share(known[:half], known[half:]), unseen_share(tokens, known)),
        near_duplicate_share([one.text for one in prompts], [one.text for one in training]),
        {name: (before.get(name, 0.0), now.get(name, 0.0)) for name in [*now, *before]},
        tuple(FarPrompt(prompts[i].where, float(similarities[i]), shorten(prompts[i].shown)) for i in order),
        likelihoods,
    )


def _judge(
    words_p_value: float,
    length_p_value: float,
    unusual: float,
    medians: tuple[float, float],
    likelihoods: PromptLikelihoods | None,
) -> tuple[bool, str]:
    scored = {} if likelihoods is None else {name: one for name, one in likelihoods.models.items() if one.is_judged}
    p_values = [words_p_value, length_p_value, *(one.p_value for one in scored.values())]
    significance = SIGNIFICANCE / len(p_values)
    differences = []
    if words_p_value < significance:
        differences.append(f"different words (p = {words_p_value:.2g})")
    if length_p_value < significance:
        differences.append(
            f"different lengths (p = {length_p_value:.2g}; median {medians[0]:.0f} tokens in training, now {medians[1]:.0f})"
        )
    unlikely = {name: one for name, one in scored.items() if one.p_value < significance}
    if unlikely:
        models = ", ".join(
            f"{name} model: p = {one.p_value:.2g}, median {one.median_loss[0]:.2f} nats a token in training, now "
            f"{one.median_loss[1]:.2f}"
            for name, one in unlikely.items()
        )
        differences.append(f"different likelihoods ({models})")
    far = f"{unusual:.0%} of the prompts are unlike any in training, where {_RARE:.0%} would be expected"
    if not differences:
        p_value = min(1.0, len(p_values) * min(p_values))
        return False, f"The prompts are like the training prompts (p = {p_value:.2g}); {far}."
    change = abs(medians[1] / max(1.0, medians[0]) - 1)
    matters = (
        unusual > MAX_UNUSUAL
        or (length_p_value < significance and change > MAX_LENGTH_CHANGE)
        or any(one.unlikely > MAX_UNUSUAL for one in unlikely.values())
    )
    begin = "The prompts have drifted" if matters else "The prompts differ slightly from the training prompts"
    return matters, f"{begin}: {' and '.join(differences)}; {far}."


def shorten(text: str) -> str:
    """Return the beginning of a text on one line."""
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT_CHARS else f"{text[:_MAX_TEXT_CHARS]} ..."
