"""The verdict of an evaluation: whether fine-tuning helped, on the same prompts and against each baseline. Without torch.

For scores of 0 and 1, the interval is Tango's score interval ("Equivalence test and confidence interval for the difference in
proportions for the paired-sample design", Statistics in Medicine 17, 1998), which also holds if no answers differ, or all do.

For graded scores it is Student's interval of the mean difference over prompts.

The exact test is McNemar's, in the binomial form, on the pairs whose scores differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from launcher.data.checks import patterns
from launcher.tracking.verdicts import (
    TUNED,
    AnswerExample,
    BaselineComparison,
    ComparisonOutcome,
    EvaluationVerdict,
    GeneralLoss,
    format_difference,
)

Scores = npt.NDArray[np.float64]

# With fewer pairs that differ, the exact test decides instead of the interval.
MIN_DISCORDANT = 10
SIGNIFICANCE = 0.05
# A smaller difference is not worth more prompts.
SMALLEST_DIFFERENCE = 0.05
_NUM_EXAMPLES = 5
# Number of wins, losses and ties whose texts are kept.
_NUM_SHOWN = 3
_MAX_SHOWN_CHARS = 1_500
# Sums of fractions differ in the last bits, but a bound of zero must not count as above zero.
_DECIMALS = 12
_NORMAL = NormalDist()


def judge(
    metric: str,
    scores: Mapping[str, Scores],
    *,
    others: Mapping[str, Mapping[str, Scores]] | None = None,
    general_loss: GeneralLoss | None = None,
) -> EvaluationVerdict:
    """Compare the tuned model with each baseline.

    Args:
        metric: name of the primary metric.
        scores: scores by side, one number per prompt, in the same order; the sides are `tuned` and the baselines. Higher is
            better.
        others: the same for further metrics, which appear in the table but not in the sentence.
        general_loss: loss on general text before and after.

    The outcome is `better` only if the lower bound of the paired 95% interval is above zero against each baseline. It is `worse`
    if the upper bound is below zero against one of them. With several baselines that interval is wider (Bonferroni), so that
    without a difference about 5% of all evaluations have an outcome.
    """
    by_metric = {metric: scores, **(others or {})}
    comparisons = tuple(
        _compare_sides(name, baseline, sides[TUNED], sides[baseline], len(sides) - 1)
        for name, sides in by_metric.items()
        for baseline in sides
        if baseline != TUNED
    )
    primary = [one for one in comparisons if one.metric == metric]
    num_prompts, outcomes = len(scores[TUNED]), {one.outcome for one in primary}
    outcome = ComparisonOutcome.BETTER if outcomes == {ComparisonOutcome.BETTER} else ComparisonOutcome.UNCLEAR
    if ComparisonOutcome.WORSE in outcomes:
        outcome = ComparisonOutcome.WORSE
    means = {
        name: {side: float(values.mean()) if len(values) else 0.0 for side, values in sides.items()}
        for name, sides in by_metric.items()
    }
    sentence = _write_sentence(metric, outcome, means[metric], primary, num_prompts)
    if general_loss is not None:
        sentence = f"{sentence} {describe_general_loss(general_loss)}"
    return EvaluationVerdict(
        metric=metric,
        outcome=outcome,
        sentence=sentence,
        num_prompts=num_prompts,
        means=means,
        comparisons=comparisons,
        general_loss=general_loss,
    )


def with_examples(
    verdict: EvaluationVerdict, prompts: Sequence[str], references: Sequence[str], answers: Mapping[str, Sequence[str]]
) -> EvaluationVerdict:
    """Return the verdict with the texts of some wins, losses and ties by the primary metric, largest differences first.

    Texts are shortened, and credentials in them are removed: other people read a verdict, and it is sent to W&B.
    """
    examples = []
    for one in verdict.primary:
        for kind, numbers in (("win", one.win_examples), ("loss", one.loss_examples), ("tie", one.tie_examples)):
            for number in numbers[:_NUM_SHOWN]:
                texts = [prompts[number], references[number], *(answers[side][number] for side in verdict.sides)]
                redacted = [patterns.redact([text])[0] for text in texts]
                prompt, reference, *others = (
                    text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]} ..." for text in redacted
                )
                by_side = dict(zip(verdict.sides, others, strict=True))
                examples.append(AnswerExample(kind, one.baseline, prompt, reference, by_side))
    return replace(verdict, examples=tuple(examples))


def _compare_sides(metric: str, baseline: str, tuned: Scores, base: Scores, num_baselines: int) -> BaselineComparison:
    if len(tuned) != len(base):
        raise ValueError(f"{baseline} has {len(base)} scores, the tuned model {len(tuned)}")
    differences = np.asarray(tuned, np.float64) - np.asarray(base, np.float64)
    signs = np.sign(np.round(differences, _DECIMALS))
    wins, losses = int((signs > 0).sum()), int((signs < 0).sum())
    discordant = wins + losses
    mean = float(differences.mean()) if len(differences) else 0.0
    is_binary = bool(np.isin(np.round(np.abs(differences), _DECIMALS), (0.0, 1.0)).all())
    # The bounds of the 95% interval, and the upper bound of the wider one that decides whether the model is worse.
    low, high, worst_high = -math.inf, math.inf, math.inf
    wider = 1 - SIGNIFICANCE / num_baselines
    if len(differences) > 1 and is_binary:
        low, high = score_interval(wins, losses, len(differences))
        _, worst_high = score_interval(wins, losses, len(differences), wider)
    elif len(differences) > 1:
        low, high = mean_interval(differences)
        _, worst_high = mean_interval(differences, wider)
    p_value, differing_share = None, 0.0
    if discordant < MIN_DISCORDANT and len(differences) > 1:
        # Of graded scores, as many may differ by 1 that this sample does not contain.
        _, unseen = score_interval(0, 0, len(differences))
        low, high = (low, high) if is_binary else (min(low, mean - unseen), max(high, mean + unseen))
        differing_share = upper_share(discordant, len(differences))
    if discordant < MIN_DISCORDANT:
        p_value = exact_mcnemar(wins, losses)
        is_better = p_value < SIGNIFICANCE and wins > losses and low > 0
        is_worse = p_value < SIGNIFICANCE / num_baselines and losses > wins and high < 0
    else:
        is_better, is_worse = low > 0, worst_high < 0
    outcome = ComparisonOutcome.BETTER if is_better else ComparisonOutcome.WORSE if is_worse else ComparisonOutcome.UNCLEAR
    needed = None
    if outcome == ComparisonOutcome.UNCLEAR:
        # The formula assumes a large sample; this sample has shown that its own size is not sufficient.
        needed = max(prompts_needed(differences, SMALLEST_DIFFERENCE, differing_share), len(differences) + 1)
    order = np.argsort(-np.abs(differences), kind="stable")
    return BaselineComparison(
        metric,
        baseline,
        outcome,
        mean,
        low if math.isfinite(low) else None,
        high if math.isfinite(high) else None,
        p_value,
        wins,
        losses,
        len(differences) - discordant,
        needed,
        *(tuple(int(i) for i in order if sign == signs[i])[:_NUM_EXAMPLES] for sign in (1, -1, 0)),
    )


def _write_sentence(
    metric: str,
    outcome: ComparisonOutcome,
    means: Mapping[str, float],
    comparisons: Sequence[BaselineComparison],
    num_prompts: int,
) -> str:
    score = f"{metric.replace('_', ' ')} {means[TUNED]:.2f}"
    if not comparisons:
        return f"The run started from random weights, so there is no base model to compare with: {score}."
    against = " and ".join(f"{means[one.baseline]:.2f} ({one.baseline})" for one in comparisons)
    # The deciding comparison: the one that is lost, else the hardest unclear one, else the hardest.
    deciding = min(
        (one for one in comparisons if one.outcome == outcome),
        key=lambda one: one.difference if one.low is None else one.low,
        default=comparisons[0],
    )
    figures = f"{score} against {against}; difference to {deciding.baseline} {format_difference(deciding)}"
    if deciding.p_value is not None:
        figures += f", {deciding.wins} better and {deciding.losses} worse answers, exact test p = {deciding.p_value:.2g}"
    if outcome == ComparisonOutcome.BETTER:
        return f"Fine-tuning helped: {figures}."
    if outcome == ComparisonOutcome.WORSE:
        return f"Fine-tuning did not help: {figures}."
    better = [one.baseline for one in comparisons if one.outcome == ComparisonOutcome.BETTER]
    beats = f"It is better than {' and '.join(better)}. " if better else ""
    size, needed = max(abs(deciding.difference), SMALLEST_DIFFERENCE), deciding.prompts_needed or 0
    # Rounded up to two digits, because the number is an estimate.
    unit = 10 ** max(0, len(str(needed)) - 2)
    more = f"About {math.ceil(needed / unit) * unit:,} prompts could tell a difference of {size:.2f}; {num_prompts:,} were used."
    return f"The data cannot tell whether fine-tuning helped: {figures}. {beats}{more}"


def describe_general_loss(loss: GeneralLoss) -> str:
    """Return one sentence on whether the model has forgotten: the loss on general text before and after."""
    change = loss.after - loss.before
    moved = f"{'rose' if change > 0 else 'fell'} by {abs(change):.2f}" if abs(change) >= 0.005 else "did not change"
    until = "" if loss.measured_at is None else f" until step {loss.measured_at}, where it was measured last"
    if loss.is_forgetting:
        rise = f"({change / loss.before:.0%}) on general text{until}"
        return f"General loss {moved} {rise}: the model has forgotten some of what it knew."
    return f"General loss {moved}{until}: no sign of forgetting."


def mean_interval(differences: Scores, confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's bounds of the mean of at least two differences."""
    t = t_quantile(1 - (1 - confidence) / 2, len(differences) - 1)
    mean, half = float(differences.mean()), t * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return round(mean - half, _DECIMALS), round(mean + half, _DECIMALS)


def score_interval(wins: int, losses: int, num_prompts: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Tango's bounds of the difference between two paired proportions, from the counts of pairs that differ.

    They hold for few pairs too: without any that differ, they are z^2 / (n + z^2) below and above zero.
    """
    z = _NORMAL.inv_cdf(1 - (1 - confidence) / 2)
    return -_find_upper_score_bound(losses, wins, num_prompts, z), _find_upper_score_bound(wins, losses, num_prompts, z)


def _find_upper_score_bound(wins: int, losses: int, num_prompts: int, z: float) -> float:
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
