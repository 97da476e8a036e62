"""How much of each source is in one epoch: weights, token budgets, passes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from launcher.config.data import Source
from launcher.errors import DataError, Problem


def budgets(sources: Sequence[Source], num_tokens: Sequence[int]) -> list[int]:
    """Tokens that each source gives to one epoch, where it has `num_tokens` of them.

    A source gives `epochs` passes over what it has, and at most `max_tokens`. Sources with a weight give less than that where
    needed, so that their tokens are in proportion to their weights: as many as the scarcest of them allows.

    Errors: DataError where the weights sum to zero, and where a weighted source has nothing to give.
    """
    limits = [
        min(source.epochs * tokens, math.inf if source.max_tokens is None else source.max_tokens)
        for source, tokens in zip(sources, num_tokens, strict=True)
    ]
    weights = [source.weight for source in sources]
    if all(weight == 0 for weight in weights):
        remedy = "give at least one source a weight above 0, or leave the weights out"
        raise DataError(Problem("the weights of the mixture sum to zero", "data.sources", remedy=remedy))
    for i, (weight, limit) in enumerate(zip(weights, limits, strict=True)):
        if weight and not limit:
            what = "a source with a weight has no document to train on, so that the mixture would be empty"
            raise DataError(Problem(what, f"data.sources[{i}]", sources[i].name, "add documents, or take the source out"))
    scale = min((limit / weight for weight, limit in zip(weights, limits, strict=True) if weight), default=0.0)
    return [round(limit if weight is None else weight * scale) for weight, limit in zip(weights, limits, strict=True)]


def shares(sources: Sequence[Source], num_tokens: Sequence[int]) -> list[float]:
    """The share of each source's tokens that is in one epoch, at most 1: see `budgets`."""
    given = budgets(sources, num_tokens)
    return [min(1.0, budget / max(1, tokens)) for budget, tokens in zip(given, num_tokens, strict=True)]


def passes(lengths: np.ndarray, budget: int, seed: int) -> list[np.ndarray]:
    """Document numbers of each pass over a source: whole passes first, then as many documents as the rest of the budget takes.

    Those of the last pass are drawn by `seed` alone, so that they stand for the whole source. Numbers ascend in each pass.
    """
    total = int(lengths.sum())
    if not total:
        return []
    whole, rest = divmod(budget, total)
    # Raw output of PCG64 is the same in every release of numpy (NEP 19).
    drawn = np.argsort(np.random.PCG64(seed).random_raw(len(lengths)), kind="stable")
    last = np.sort(drawn[: np.searchsorted(np.cumsum(lengths[drawn]), rest, side="right")])
    return [np.arange(len(lengths))] * whole + [last] * (len(last) > 0)
