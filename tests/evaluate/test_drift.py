"""Statistical tests for drift from the training prompts: they keep their significance level and detect changes."""

from __future__ import annotations

import numpy as np
import pytest

from launcher.evaluate.drift import features, likelihood, two_sample
from launcher.evaluate.drift.comparison import Prompt, compare
from launcher.evaluate.drift.likelihood import PromptLikelihoods

_WORDS = [f"word{number}" for number in range(400)]


def sample(number: int, seed: int, *, first: int = 0, words: int = 300, length: int = 20) -> list[Prompt]:
    """Return prompts of two common tokens followed by random words from a part of the vocabulary."""
    generator = np.random.default_rng(seed)
    prompts = []
    for i in range(number):
        ids = [1, 2, *(10 + first + generator.integers(words, size=max(1, int(generator.poisson(length)))))]
        text = " ".join(_WORDS[(token - 10) % len(_WORDS)] for token in ids[2:])
        prompts.append(Prompt(f"line {i}", text, tuple(int(one) for one in ids), text))
    return prompts


@pytest.mark.rest  # many simulated comparisons
def test_prompts_of_one_distribution_are_rarely_called_others() -> None:
    reports = [compare(sample(60, seed), sample(120, 1_000 + seed)) for seed in range(40)]
    assert sum(report.has_drifted for report in reports) <= 1
    assert np.mean([report.words_p_value for report in reports]) == pytest.approx(0.5, abs=0.2)
    assert reports[0].sentence.startswith("The prompts are like the training prompts (p = ")


def test_other_words_are_found() -> None:
    report = compare(sample(60, 1, first=200), sample(120, 2))
    assert report.has_drifted
    assert report.sentence.startswith("The prompts have drifted: different words (p = 0.001)")
    assert report.unusual > 0.5
    assert report.unseen[1] > 0.3 > report.unseen[0]
    assert report.farthest[0].similarity <= report.farthest[-1].similarity
    assert report.farthest[0].where.startswith("line ")


def test_other_lengths_are_found() -> None:
    report = compare(sample(60, 1, length=40), sample(120, 2))
    assert report.has_drifted
    assert "different lengths (p = " in report.sentence
    assert report.median_tokens[1] > 1.5 * report.median_tokens[0]


def test_what_all_prompts_have_says_nothing() -> None:
    weights = features.TokenWeights([(1, 2, 5), (1, 2, 6)])
    assert not weights.vectors([(1, 2)]).any()
    (vector,) = weights.vectors([(1, 2, 7)])
    assert np.linalg.norm(vector) == pytest.approx(1)


def test_nearly_equal_prompts_are_counted() -> None:
    long = "The quick brown fox jumps over the lazy dog while the band plays on and everybody in the town listens to it closely"
    training = ["short one", long]
    assert features.near_duplicate_share(["Short  one!", long + " today", "something else", "short two"], training) == 0.5


def test_scripts_are_those_of_most_letters() -> None:
    assert features.scripts(["hello мир привет", "hello", "你好吗", "42"]) == {
        "Cyrillic": 0.25,
        "Latin": 0.25,
        "Cjk": 0.25,
        "No letters": 0.25,
    }


def test_the_length_test_has_the_published_distribution() -> None:
    """The 5% point of the Kolmogorov distribution is 1.358 (Smirnov 1948)."""
    first, second = np.arange(1000.0), np.arange(1000.0)
    assert two_sample.kolmogorov_smirnov_p_value(first, second) == 1.0
    shift = round(1.358 * np.sqrt(2 / 1000) * 1000)
    assert two_sample.kolmogorov_smirnov_p_value(first, second + shift) == pytest.approx(0.05, abs=0.005)


def test_the_permutation_test_is_exact_for_equal_samples() -> None:
    vectors = np.eye(8, dtype=np.float32)
    assert two_sample.mmd_p_value(vectors[:4], vectors[:4]) > 0.5
    assert two_sample.mmd_p_value(np.repeat(vectors[:1], 8, 0), np.repeat(vectors[1:2], 8, 0)) < 0.01


def likelihoods(seed: int, shift: float, *, is_judged: bool = True) -> PromptLikelihoods:
    """Return losses of 60 prompts, increased by `shift`, and of 120 training prompts."""
    generator = np.random.default_rng(seed)
    now, before = generator.normal(3 + shift, 0.5, 60), generator.normal(3, 0.5, 120)
    return PromptLikelihoods({"tuned": likelihood.compare_losses(7, now, before, is_judged)})


def test_prompts_that_are_less_likely_have_drifted() -> None:
    report = compare(sample(60, 1), sample(120, 2), likelihoods(3, 0.6))
    assert report.has_drifted
    assert "different likelihoods (tuned model: p = " in report.sentence
    assert report.likelihoods is not None
    one = report.likelihoods.models["tuned"]
    assert one.unlikely > 0.1
    assert one.median_loss[1] - one.median_loss[0] == pytest.approx(0.6, abs=0.2)
    # A model finds its own training prompts likely, so its likelihoods are not judged.
    assert not compare(sample(60, 1), sample(120, 2), likelihoods(3, 0.6, is_judged=False)).has_drifted
    shorter = compare(sample(60, 1), sample(120, 2), likelihoods(3, -0.6))
    assert not shorter.has_drifted
    assert shorter.sentence.startswith("The prompts differ slightly from the training prompts: different likelihoods")


@pytest.mark.rest  # many simulated comparisons
def test_all_tests_together_hold_their_level() -> None:
    same = [compare(sample(60, seed), sample(120, 1_000 + seed), likelihoods(seed, 0)) for seed in range(40)]
    assert sum(not report.sentence.startswith("The prompts are like the training prompts") for report in same) <= 2


def test_what_all_prompts_share_is_left_out_of_their_losses() -> None:
    begin, end = likelihood.find_shared_ends([(1, 2, 5, 6, 9), (1, 2, 7, 9), (1, 2, 5, 8, 8, 9)])
    assert (begin, end) == ((1, 2), (9,))
    assert likelihood.span_between((1, 2, 5, 6, 9), begin, end) == (2, 4)
    assert likelihood.span_between((1, 3, 5, 9), begin, end) == (1, 3)
    assert likelihood.span_between((1, 2, 9), begin, end) == (2, 2)
    assert likelihood.span_between((1,), begin, end) == (1, 1)
    assert likelihood.find_shared_ends([(1, 2), (1, 2)]) == ((1, 2), ())
