"""Statistics of paired scores: whether one side is better than the other on the same prompts. Pure, and without torch.

For scores of 0 and 1, the interval is Tango's score interval ("Equivalence test and confidence interval for the difference in
proportions for the paired-sample design", Statistics in Medicine 17, 1998), which also holds if no answers differ, or all do.

For graded scores it is the percentile bootstrap over prompts (Efron and Tibshirani, An Introduction to the Bootstrap, chapter
13), with the percentiles moved outwards for small samples as in Hesterberg, "What Teachers Should Know about the Bootstrap"
(2015, section 3.3.1): the plain percentiles of n prompts are too narrow by about sqrt((n - 1) / n), and by the difference between
the normal and the t distribution.

The exact test is McNemar's, in the binomial form, on the pairs whose scores differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]

NUM_DRAWS = 10_000
SEED = 20_240_229
# Maximum number of drawn indices in memory at a time.
_MAX_DRAWN = 4_000_000
# Sums of fractions differ in the last bits, but a bound of zero must not count as above zero.
_DECIMALS = 12
_NORMAL = NormalDist()


@dataclass(frozen=True)
class PairedCounts:
    """Prompts on which the first side scores higher, lower, and the same as the second."""

    wins: int
    losses: int
    ties: int

    @property
    def discordant(self) -> int:
        return self.wins + self.losses


def count_pairs(differences: Scores) -> PairedCounts:
    """Count the prompts by the sign of their difference."""
    rounded = np.round(differences, _DECIMALS)
    wins, losses = int((rounded > 0).sum()), int((rounded < 0).sum())
    return PairedCounts(wins, losses, len(rounded) - wins - losses)


def bootstrap_means(differences: Scores, num_draws: int = NUM_DRAWS, seed: int = SEED) -> Scores:
    """Return the mean difference in each of `num_draws` samples of the prompts, drawn with replacement, in ascending order."""
    generator = np.random.default_rng(seed)
    num_prompts = len(differences)
    draws_at_once = max(1, _MAX_DRAWN // num_prompts)
    means = [
        differences[generator.integers(num_prompts, size=(min(draws_at_once, num_draws - start), num_prompts))].mean(axis=1)
        for start in range(0, num_draws, draws_at_once)
    ]
    return np.sort(np.concatenate(means))


def interval(sorted_means: Scores, num_prompts: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the bounds of the mean, from `bootstrap_means` of `num_prompts` prompts.

    With one prompt, nothing is known about the spread, so both bounds are infinite.
    """
    if num_prompts < 2:
        return -math.inf, math.inf
    t = t_quantile(1 - (1 - confidence) / 2, num_prompts - 1)
    tail = _NORMAL.cdf(-t * math.sqrt(num_prompts / (num_prompts - 1)))
    low, high = np.quantile(sorted_means, [tail, 1 - tail])
    return round(float(low), _DECIMALS), round(float(high), _DECIMALS)


def score_interval(wins: int, losses: int, num_prompts: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Tango's bounds of the difference between two paired proportions, from the counts of pairs that differ.

    They hold for few pairs too: without any that differ, they are z^2 / (n + z^2) below and above zero.
    """
    z = _NORMAL.inv_cdf(1 - (1 - confidence) / 2)
    return -_upper_score_bound(losses, wins, num_prompts, z), _upper_score_bound(wins, losses, num_prompts, z)


def _upper_score_bound(wins: int, losses: int, num_prompts: int, z: float) -> float:
    """Return the largest difference from which the observed one is less than z standard errors away, by bisection."""
    low, high = (wins - losses) / num_prompts, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        b = -wins - losses + (2 * num_prompts - wins + losses) * middle
        c = -losses * middle * (1 - middle)
        # The likeliest share of losses if the difference is `middle`.
        share = (math.sqrt(max(0.0, b * b - 8 * num_prompts * c)) - b) / (4 * num_prompts)
        variance = num_prompts * (2 * share + middle * (1 - middle))
        is_within = num_prompts * middle - (wins - losses) <= z * math.sqrt(max(0.0, variance))
        low, high = (middle, high) if is_within else (low, middle)
    return round((low + high) / 2, _DECIMALS)


def upper_share(count: int, num_prompts: int) -> float:
    """Return the upper bound of the 95% interval of a share (Wilson, 1927)."""
    z, share = _NORMAL.inv_cdf(0.975), count / num_prompts
    center = share + z * z / (2 * num_prompts)
    spread = z * math.sqrt(share * (1 - share) / num_prompts + z * z / (4 * num_prompts**2))
    return min(1.0, (center + spread) / (1 + z * z / num_prompts))


def exact_mcnemar(wins: int, losses: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: a binomial test of wins among the pairs that differ."""
    discordant = wins + losses
    tail = sum(math.comb(discordant, count) for count in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def prompts_needed(differences: Scores, smallest_difference: float, differing_share: float = 0.0) -> int:
    """Return how many prompts would show the observed difference with a probability of 80%.

    The formula is that of a paired z-test, two-sided at 5%: ((z_0.975 + z_0.8) * s / d)^2, with the spread s of the differences.
    If the difference d is below `smallest_difference` in absolute value, `smallest_difference` is used. The spread is at least
    that of scores of 0 and 1 that differ on a share d of the prompts, all in one direction: no sample with such a mean difference
    has less. `differing_share` raises it to that of scores of 0 and 1 that differ on this share of the prompts.
    """
    mean = float(differences.mean()) if len(differences) else 0.0
    difference = max(abs(mean), smallest_difference)
    variance = float(differences.var(ddof=1)) if len(differences) > 1 else 0.0
    variance = max(variance, difference * (1 - difference) if difference < 1 else 0.0, differing_share - difference**2)
    factor = _NORMAL.inv_cdf(0.975) + _NORMAL.inv_cdf(0.8)
    return math.ceil(factor**2 * variance / difference**2)


def t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution by the expansion of Abramowitz and Stegun, 26.7.5.

    From 3 degrees of freedom, it differs by at most 0.3% up to 99.5%; with fewer, the quantile is too small.
    """
    z = _NORMAL.inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))
