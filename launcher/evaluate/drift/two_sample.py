"""Two-sample tests: whether two samples come from the same distribution. Pure, and without torch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]

NUM_PERMUTATIONS = 999
SEED = 20_240_229
# Number of permutations whose sums are in memory at a time.
_AT_ONCE = 111


def mmd_p_value(first: Vectors, second: Vectors, num_permutations: int = NUM_PERMUTATIONS, seed: int = SEED) -> float:
    """Return the p-value of the maximum mean discrepancy between unit vectors, [n, d] and [m, d], by permutation.

    Gretton et al., A Kernel Two-Sample Test (2012). The kernel is exp(-distance^2 / median distance^2).
    """
    together = np.concatenate([first, second])
    squared = np.maximum(2 - 2 * (together @ together.T), 0)
    median = float(np.median(squared[np.triu_indices(len(together), 1)]))
    kernel = np.exp(-squared / (median or 1.0)).astype(np.float32)
    weights = np.concatenate([np.full(len(first), 1 / len(first)), np.full(len(second), -1 / len(second))]).astype(np.float32)
    observed = float(weights @ kernel @ weights)
    generator, num_larger = np.random.default_rng(seed), 0
    for start in range(0, num_permutations, _AT_ONCE):
        count = min(_AT_ONCE, num_permutations - start)
        permuted = generator.permuted(np.tile(weights, (count, 1)), axis=1)
        num_larger += int((np.einsum("pn,pn->p", permuted @ kernel, permuted) >= observed).sum())
    return (num_larger + 1) / (num_permutations + 1)


def kolmogorov_smirnov_p_value(first: Numbers, second: Numbers) -> float:
    """Return the p-value of the two-sample Kolmogorov-Smirnov test, by the asymptotic distribution.

    Numerical Recipes, 3rd edition, section 14.3.3. With ties the p-value is too large, which errs on the side of no difference.
    """
    values = np.concatenate([first, second])
    first, second = np.sort(first), np.sort(second)
    shares = [np.searchsorted(sample, values, side="right") / len(sample) for sample in (first, second)]
    distance = float(np.abs(shares[0] - shares[1]).max())
    effective = math.sqrt(len(first) * len(second) / (len(first) + len(second)))
    x = (effective + 0.12 + 0.11 / effective) * distance
    if x < 0.2:
        # The series converges slowly here, to 1.
        return 1.0
    total = sum((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * total))
