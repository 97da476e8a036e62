"""Compares prompts with those of training by their words, lengths and likelihoods. Pure, and without torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]

# Significance level of all tests together.
SIGNIFICANCE = 0.01
# A difference that a test detects with many prompts may be too small to matter.
MAX_UNUSUAL, MAX_LENGTH_CHANGE = 0.10, 0.25
# A prompt is unusual, or unlikely, if it is farther from training than all but this share of the training prompts.
RARE = 0.05
_NUM_PERMUTATIONS, _SEED = 999, 20_240_229
# Number of permutations whose sums are in memory at a time.
_AT_ONCE = 111
_NUM_DIMENSIONS, _MIX = 4096, 0x9E3779B97F4A7C15
_NUM_FARTHEST, _MAX_TEXT_CHARS = 5, 200


@dataclass(frozen=True)
class Prompt:
    """A prompt as in training: its place, its tokens, and the part that a person wrote."""

    where: str
    tokens: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Measure:
    """One property of the prompts, in training and now; `p_value` is from a two-sample test.

    `title` describes the two figures. `is_large` is whether their difference matters, however significant it is.
    """

    name: str
    title: str
    training: float
    now: float
    p_value: float
    is_large: bool


@dataclass(frozen=True)
class FarPrompt:
    """A prompt unlike any training prompt; `similarity` is the cosine with the nearest one."""

    where: str
    similarity: float
    text: str


@dataclass(frozen=True)
class DriftReport:
    """How prompts compare with those of training; `gaps` says which models have not scored them, and why."""

    has_drifted: bool
    sentence: str
    num_prompts: int
    num_training: int
    measures: tuple[Measure, ...]
    farthest: tuple[FarPrompt, ...]
    gaps: tuple[str, ...] = ()


def compare(
    prompts: Sequence[Prompt],
    training: Sequence[Prompt],
    losses: Mapping[str, tuple[Numbers, Numbers]] | None = None,
    gaps: Sequence[str] = (),
) -> DriftReport:
    """Compare prompts with training prompts, both random samples.

    `losses` are the mean losses in nats per token, of prompts and of training prompts, by the name of a model.
    """
    known = [one.tokens for one in training]
    vectors, training_vectors = (make_vectors([one.tokens for one in side], known) for side in (prompts, training))
    among = training_vectors @ training_vectors.T
    np.fill_diagonal(among, -1)
    nearest = (vectors @ training_vectors.T).max(axis=1)
    unusual = float((nearest < np.quantile(among.max(axis=1), RARE)).mean())
    words = Measure(
        "words", "unlike all others in training", RARE, unusual, mmd_p_value(vectors, training_vectors), unusual > MAX_UNUSUAL
    )
    now, before = (np.array([len(one.tokens) for one in side], dtype=np.float64) for side in (prompts, training))
    medians = float(np.median(before)), float(np.median(now))
    is_large = abs(medians[1] / max(1.0, medians[0]) - 1) > MAX_LENGTH_CHANGE
    measures = [words, Measure("lengths", "median length in tokens", *medians, kolmogorov_smirnov_p_value(now, before), is_large)]
    for model, (now, before) in (losses or {}).items():
        unlikely = float((now > np.quantile(before, 1 - RARE)).mean())
        medians = float(np.median(before)), float(np.median(now))
        name, title = f"likelihoods ({model} model)", f"median loss per token, {model} model"
        measures.append(Measure(name, title, *medians, kolmogorov_smirnov_p_value(now, before), unlikely > MAX_UNUSUAL))
    differing = [one for one in measures if one.p_value < SIGNIFICANCE / len(measures)]
    has_drifted = any(one.is_large for one in differing)
    begin = "The prompts have drifted" if has_drifted else "The prompts differ slightly from the training prompts"
    sentence = f"{begin}: {' and '.join(f'different {one.name} (p = {one.p_value:.2g})' for one in differing)}."
    if not differing:
        p_value = min(1.0, len(measures) * min(one.p_value for one in measures))
        sentence = f"The prompts are like the training prompts (p = {p_value:.2g})."
    farthest = [
        FarPrompt(prompts[i].where, float(nearest[i]), " ".join(prompts[i].text.split())[:_MAX_TEXT_CHARS])
        for i in np.argsort(nearest, kind="stable")[:_NUM_FARTHEST]
    ]
    return DriftReport(has_drifted, sentence, len(prompts), len(training), tuple(measures), tuple(farthest), tuple(gaps))


def make_vectors(prompts: Sequence[Sequence[int]], training: Sequence[Sequence[int]]) -> Vectors:
    """Return unit vectors of TF-IDF weights, float32 [prompts, dimensions]; zeros for a prompt without weighted tokens.

    The weight of a token depends on how many training prompts contain it: tokens of all, such as the chat template's, have none.
    Token ids share the dimensions by a hash.
    """
    counts = Counter(token for prompt in training for token in {*prompt})
    vectors = np.zeros((len(prompts), _NUM_DIMENSIONS), dtype=np.float32)
    for row, prompt in zip(vectors, prompts, strict=True):
        for token, count in Counter(prompt).items():
            weight = np.log((1 + len(training)) / (1 + counts[token])) * (1 + np.log(count))
            hashed = (token * _MIX) & 0xFFFF_FFFF_FFFF_FFFF
            row[(hashed >> 20) % _NUM_DIMENSIONS] += weight if hashed >> 63 else -weight
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    np.divide(vectors, lengths, out=vectors, where=lengths > 0)
    return vectors


def mmd_p_value(first: Vectors, second: Vectors) -> float:
    """Return the p-value of the maximum mean discrepancy between unit vectors, [n, d] and [m, d], by permutation.

    Gretton et al., A Kernel Two-Sample Test (2012). The kernel is exp(-distance^2 / median distance^2).
    """
    together = np.concatenate([first, second])
    squared = np.maximum(2 - 2 * (together @ together.T), 0)
    median = float(np.median(squared[np.triu_indices(len(together), 1)]))
    kernel = np.exp(-squared / (median or 1.0)).astype(np.float32)
    weights = np.concatenate([np.full(len(first), 1 / len(first)), np.full(len(second), -1 / len(second))]).astype(np.float32)
    observed = float(weights @ kernel @ weights)
    generator, num_larger = np.random.default_rng(_SEED), 0
    for _ in range(0, _NUM_PERMUTATIONS, _AT_ONCE):
        permuted = generator.permuted(np.tile(weights, (_AT_ONCE, 1)), axis=1)
        num_larger += int((np.einsum("pn,pn->p", permuted @ kernel, permuted) >= observed).sum())
    return (num_larger + 1) / (_NUM_PERMUTATIONS + 1)


def kolmogorov_smirnov_p_value(first: Numbers, second: Numbers) -> float:
    """Return the p-value of the two-sample Kolmogorov-Smirnov test, by the asymptotic distribution.

    Numerical Recipes, 3rd edition, section 14.3.3. With ties the p-value is too large, which errs on the side of no difference.
    """
    values = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (first, second)]
    effective = math.sqrt(len(first) * len(second) / (len(first) + len(second)))
    x = (effective + 0.12 + 0.11 / effective) * float(np.abs(shares[0] - shares[1]).max())
    if x < 0.2:
        # The series converges slowly here, to 1.
        return 1.0
    total = sum((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * total))
