"""Computes how much of each source is in one epoch: weights, token budgets, passes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from launcher.config.sections.data import Source
from launcher.errors import DataError, Problem


def compute_budgets(sources: Sequence[Source], num_tokens: Sequence[int]) -> list[int]:
    """Return the number of tokens that one epoch takes of each source; `num_tokens` are those that each source has.

    A source provides `epochs` passes over its documents, and at most `max_tokens`. Sources with a weight provide less if
    needed, so that their tokens are proportional to their weights; the scarcest of them determines the scale.

    Raises:
        DataError: if the weights sum to zero, or a source with a weight has no tokens.
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
            message = "a source with a weight has no document to train on, so the mixture would be empty"
            raise DataError(Problem(message, f"data.sources[{i}]", sources[i].name, "add documents, or remove the source"))
    scale = min((limit / weight for weight, limit in zip(weights, limits, strict=True) if weight), default=0.0)
    return [round(limit if weight is None else weight * scale) for weight, limit in zip(weights, limits, strict=True)]


def compute_shares(sources: Sequence[Source], num_tokens: Sequence[int]) -> list[float]:
    """Return the share of each source's tokens that one epoch takes, at most 1: see `compute_budgets`."""
    taken = compute_budgets(sources, num_tokens)
    return [min(1.0, budget / max(1, tokens)) for budget, tokens in zip(taken, num_tokens, strict=True)]


def draw_passes(lengths: np.ndarray, budget: int, seed: int) -> list[np.ndarray]:
    """Return the document indices of each pass over a source: whole passes first, then documents for the rest of the budget.

    The documents of the last pass are drawn by `seed` only, so they represent the whole source. Indices are ascending in each
    pass.
    """
    total = int(lengths.sum())
    if not total:
        return []
    num_whole, rest = divmod(budget, total)
    # The raw output of PCG64 is stable across releases of numpy (NEP 19).
    drawn = np.argsort(np.random.PCG64(seed).random_raw(len(lengths)), kind="stable")
    last = np.sort(drawn[: np.searchsorted(np.cumsum(lengths[drawn]), rest, side="right")])
    return [np.arange(len(lengths))] * num_whole + [last] * (len(last) > 0)
