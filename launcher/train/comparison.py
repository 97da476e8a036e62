"""Compares sampled values with expected ones: by which factor, and by how much beyond it, kinds of parameters differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Factors that differ from 1 by less are not named.
FACTOR = 0.01


class Deviation(NamedTuple):
    """The factor that brings expected values closest to the actual ones, and relative L2 norms: before and after it."""

    factor: float
    error: float
    rest: float

    @classmethod
    def of(cls, sums: Tensor) -> Deviation:
        """Return the difference from a row of `compare`, or from a sum of rows."""
        product, expected, difference = sums.tolist()
        if expected == 0:
            return cls(1.0, *(2 * [math.inf if difference else 0.0]))
        # |a|^2 = |a - e|^2 + 2ae - |e|^2
        actual = difference + 2 * product - expected
        rest = max(0.0, actual - product**2 / expected)
        return cls(product / expected, math.sqrt(difference / expected), math.sqrt(rest / actual) if actual > 0 else 0.0)

    @property
    def is_factor(self) -> bool:
        """Whether a factor explains the difference."""
        return math.isfinite(self.factor) and self.factor > FACTOR and self.rest < 0.1

    def __str__(self) -> str:
        if not self.is_factor:
            return f"wrong by {self.error:.2g} of their norm"
        if self.factor < 1:
            return f"{1 / self.factor:.2f} times too small"
        return f"{self.factor:.2f} times too large"


def compare(actual: Tensor, expected: Tensor, owner: Tensor, counts: bool | Tensor = True) -> Tensor:
    """Return sums over the samples of each parameter: actual * expected, expected^2, (actual - expected)^2; fp64 [P, 3].

    `owner` int64 [N] are the parameters of the samples; those where `counts` [N] is False are left out.
    """
    a, e = (torch.where(torch.as_tensor(counts, device=owner.device), one.double(), 0.0) for one in (actual, expected))
    sums = torch.zeros(int(owner.max()) + 1, 3, dtype=torch.float64, device=owner.device)
    return sums.index_add(0, owner, torch.stack([a * e, e.square(), (a - e).square()], dim=1))


def find_problems(
    what: str, sums: Tensor, names: Sequence[str], kinds: Mapping[str, list[int]], most: float, most_of_one: float
) -> tuple[float, list[str]]:
    """Return the largest error of a kind of parameters, and what is wrong: a kind beyond `most`, or else one parameter.

    `what` begins the description: "after the reduction, gradients". The error of one parameter is relative to its own expected
    norm and a hundredth of the mean one, because some gradients are zero but for rounding.
    """
    by_kind = {kind: Deviation.of(sums[members].sum(0)) for kind, members in kinds.items()}
    # NaN is wrong, too.
    wrong = {kind: one for kind, one in by_kind.items() if not one.error <= most}
    largest = max(one.error for one in by_kind.values())
    floor = sums[:, 1].mean().sqrt() * FACTOR
    errors = sums[:, 2].sqrt() / (sums[:, 1].sqrt() + floor).clamp(min=torch.finfo(torch.float64).tiny)
    worst = int(errors.argmax())
    if not (wrong or float(errors[worst]) > most_of_one):
        return largest, []
    # Unless a factor explains all of it, one parameter may be the reason.
    texts = {kind: str(one) for kind, one in wrong.items() if one.is_factor}
    if not texts or len(texts) < len(wrong):
        texts = {names[worst]: str(Deviation.of(sums[worst]))}
    alike = {text: ", ".join(of for of, one in texts.items() if one == text) for text in texts.values()}
    right = [kind for kind in by_kind if kind not in wrong] if wrong else []
    rest = f", those of {', '.join(right)} are right" if right else ""
    return largest, [f"{what} of {', those of '.join(f'{of} are {text}' for text, of in alike.items())}{rest}"]
