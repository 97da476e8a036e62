"""Compares how likely prompts are under a model with training prompts. Pure, and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launcher.evaluate.drift.two_sample import Numbers, kolmogorov_smirnov_p_value

# Quantile of the training prompts below which a prompt counts as unlikely.
_RARE = 0.05


@dataclass(frozen=True)
class LikelihoodComparison:
    """Mean losses of prompts in nats per token under one model.

    `p_value` is from the two-sample test, `median_loss` in training and now. `unlikely` is the share of prompts that are less
    likely than 95% of the training prompts. `is_judged` is False for a model that was trained on the training prompts, which are
    likely because it has seen them.
    """

    step: int
    p_value: float
    median_loss: tuple[float, float]
    unlikely: float
    num_prompts: int
    num_training: int
    is_judged: bool = True


@dataclass(frozen=True)
class UnlikelyPrompt:
    """A prompt with its mean loss."""

    where: str
    loss: float
    text: str


@dataclass(frozen=True)
class PromptLikelihoods:
    """The comparison for each model, `base` and `tuned`; `gaps` says which are missing, and why.

    `least_likely` are the least likely prompts under the tuned model.
    """

    models: dict[str, LikelihoodComparison]
    gaps: tuple[str, ...] = ()
    least_likely: tuple[UnlikelyPrompt, ...] = ()


def compare_losses(step: int, losses: Numbers, training: Numbers, is_judged: bool) -> LikelihoodComparison:
    """Compare the mean losses of prompts, under the weights of `step`, with those of training prompts."""
    rare = np.quantile(training, 1 - _RARE)
    return LikelihoodComparison(
        step=step,
        p_value=kolmogorov_smirnov_p_value(losses, training),
        median_loss=(float(np.median(training)), float(np.median(losses))),
        unlikely=float((losses > rare).mean()),
        num_prompts=len(losses),
        num_training=len(training),
        is_judged=is_judged,
    )


def find_shared_ends(prompts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that all prompts begin with and end with, such as the marks of a chat template."""
    shortest = min(map(len, prompts), default=0)
    first = prompts[0] if prompts else ()
    begin = next((i for i in range(shortest) if len({one[i] for one in prompts}) > 1), shortest)
    room = shortest - begin
    end = next((i for i in range(room) if len({one[len(one) - 1 - i] for one in prompts}) > 1), room)
    return tuple(first[:begin]), tuple(first[len(first) - end :])


def span_between(prompt: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> tuple[int, int]:
    """Return the span of a prompt without its part of the shared beginning and the shared end."""
    start = next((i for i, (own, shared) in enumerate(zip(prompt, begin, strict=False)) if own != shared), None)
    start = min(len(begin), len(prompt)) if start is None else start
    pairs = zip(reversed(prompt[start:]), reversed(end), strict=False)
    cut = next((i for i, (own, shared) in enumerate(pairs) if own != shared), None)
    cut = min(len(end), len(prompt) - start) if cut is None else cut
    return start, len(prompt) - cut
