"""Statistical tests for drift from the training prompts: they keep their significance level and detect changes."""

from __future__ import annotations

import numpy as np
import pytest

from launcher.evaluate import drift
from launcher.evaluate.drift import DriftReport, Measure, Numbers, Prompt, compare


def sample(number: int, seed: int, *, first: int = 0, words: int = 300, length: int = 20) -> list[Prompt]:
    """Return prompts of two common tokens followed by random words from a part of the vocabulary."""
    generator = np.random.default_rng(seed)
    prompts = []
    for i in range(number):
        ids = [1, 2, *(10 + first + generator.integers(words, size=max(1, int(generator.poisson(length)))))]
        prompts.append(Prompt(f"line {i}", tuple(int(one) for one in ids), "a text"))
    return prompts


def measure(report: DriftReport, name: str) -> Measure:
    return next(one for one in report.measures if one.name.startswith(name))


@pytest.mark.rest  # many simulated comparisons
def test_prompts_of_one_distribution_are_rarely_called_others() -> None:
    reports = [compare(sample(60, seed), sample(120, 1_000 + seed)) for seed in range(40)]
    assert sum(report.has_drifted for report in reports) <= 1
    assert np.mean([measure(report, "words").p_value for report in reports]) == pytest.approx(0.5, abs=0.2)
    assert reports[0].sentence.startswith("The prompts are like the training prompts (p = ")


def test_other_words_are_found() -> None:
    report = compare(sample(60, 1, first=200), sample(120, 2))
    assert report.has_drifted
    assert report.sentence.startswith("The prompts have drifted: different words (p = 0.001)")
    assert measure(report, "words").now > 0.5
    assert report.farthest[0].similarity <= report.farthest[-1].similarity
    assert report.farthest[0].where.startswith("line ")


def test_other_lengths_are_found() -> None:
    report = compare(sample(60, 1, length=40), sample(120, 2))
    assert report.has_drifted
    assert "different lengths (p = " in report.sentence
    assert measure(report, "lengths").now > 1.5 * measure(report, "lengths").training


def test_what_all_prompts_have_says_nothing() -> None:
    training = [(1, 2, 5), (1, 2, 6)]
    assert not drift.make_vectors([(1, 2)], training).any()
    (vector,) = drift.make_vectors([(1, 2, 7)], training)
    assert np.linalg.norm(vector) == pytest.approx(1)


def test_the_length_test_has_the_published_distribution() -> None:
    """The 5% point of the Kolmogorov distribution is 1.358 (Smirnov 1948)."""
    first, second = np.arange(1000.0), np.arange(1000.0)
    assert drift.kolmogorov_smirnov_p_value(first, second) == 1.0
    shift = round(1.358 * np.sqrt(2 / 1000) * 1000)
    assert drift.kolmogorov_smirnov_p_value(first, second + shift) == pytest.approx(0.05, abs=0.005)


def test_the_permutation_test_is_exact_for_equal_samples() -> None:
    vectors = np.eye(8, dtype=np.float32)
    assert drift.mmd_p_value(vectors[:4], vectors[:4]) > 0.5
    assert drift.mmd_p_value(np.repeat(vectors[:1], 8, 0), np.repeat(vectors[1:2], 8, 0)) < 0.01


def losses(seed: int, shift: float) -> dict[str, tuple[Numbers, Numbers]]:
    """Return losses of 60 prompts, increased by `shift`, and of 120 training prompts."""
    generator = np.random.default_rng(seed)
    return {"tuned": (generator.normal(3 + shift, 0.5, 60), generator.normal(3, 0.5, 120))}


def test_prompts_that_are_less_likely_have_drifted() -> None:
    report = compare(sample(60, 1), sample(120, 2), losses(3, 0.6))
    assert report.has_drifted
    one = measure(report, "likelihoods (tuned model)")
    assert one.now - one.training == pytest.approx(0.6, abs=0.2)
    likelier = compare(sample(60, 1), sample(120, 2), losses(3, -0.6))
    assert not likelier.has_drifted
    assert likelier.sentence.startswith("The prompts differ slightly from the training prompts: different likelihoods")
