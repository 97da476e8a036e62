"""The verdict of an evaluation: whether fine-tuning helped, on the same prompts and against each baseline. Without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from launcher.data.checks import patterns
from launcher.evaluate import statistics
from launcher.evaluate.statistics import Scores
from launcher.tracking.verdicts import (
    TUNED,
    AnswerExample,
    BaselineComparison,
    ComparisonOutcome,
    EvaluationVerdict,
    GeneralLoss,
    format_difference,
)

# With fewer pairs that differ, the exact test decides instead of the interval.
MIN_DISCORDANT = 10
SIGNIFICANCE = 0.05
# A smaller difference is not worth more prompts.
SMALLEST_DIFFERENCE = 0.05
_NUM_EXAMPLES = 5
# Number of wins, losses and ties whose texts are kept.
_NUM_SHOWN = 3
_MAX_SHOWN_CHARS = 1_500


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
        _compare_with(name, baseline, sides[TUNED], sides[baseline], len(sides) - 1)
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
    sentence = _sentence(metric, outcome, means[metric], primary, num_prompts)
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
                prompt, reference, *others = (_shortened(patterns.redact([text])[0]) for text in texts)
                by_side = dict(zip(verdict.sides, others, strict=True))
                examples.append(AnswerExample(kind, one.baseline, prompt, reference, by_side))
    return replace(verdict, examples=tuple(examples))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]} ..."


def _compare_with(metric: str, baseline: str, tuned: Scores, base: Scores, num_baselines: int) -> BaselineComparison:
    if len(tuned) != len(base):
        raise ValueError(f"{baseline} has {len(base)} scores, the tuned model {len(tuned)}")
    differences = np.asarray(tuned, np.float64) - np.asarray(base, np.float64)
    counts = statistics.count_pairs(differences)
    mean = float(differences.mean()) if len(differences) else 0.0
    is_binary = bool(np.isin(np.round(np.abs(differences), 12), (0.0, 1.0)).all())
    low, high, worst_high = _bounds(differences, is_binary, num_baselines)
    p_value, differing_share = None, 0.0
    if counts.discordant < MIN_DISCORDANT and len(differences) > 1:
        # Of graded scores, as many may differ by 1 that this sample does not contain.
        _, unseen = statistics.score_interval(0, 0, len(differences))
        low, high = (low, high) if is_binary else (min(low, mean - unseen), max(high, mean + unseen))
        differing_share = statistics.upper_share(counts.discordant, len(differences))
    if counts.discordant < MIN_DISCORDANT:
        p_value = statistics.exact_mcnemar(counts.wins, counts.losses)
        is_better = p_value < SIGNIFICANCE and counts.wins > counts.losses and low > 0
        is_worse = p_value < SIGNIFICANCE / num_baselines and counts.losses > counts.wins and high < 0
    else:
        is_better, is_worse = low > 0, worst_high < 0
    outcome = ComparisonOutcome.BETTER if is_better else ComparisonOutcome.WORSE if is_worse else ComparisonOutcome.UNCLEAR
    needed = None
    if outcome == ComparisonOutcome.UNCLEAR:
        # The formula assumes a large sample; this sample has shown that its own size is not sufficient.
        needed = max(statistics.prompts_needed(differences, SMALLEST_DIFFERENCE, differing_share), len(differences) + 1)
    order = np.argsort(-np.abs(differences), kind="stable")
    rounded = np.round(differences, 12)
    return BaselineComparison(
        metric,
        baseline,
        outcome,
        mean,
        low if math.isfinite(low) else None,
        high if math.isfinite(high) else None,
        p_value,
        counts.wins,
        counts.losses,
        counts.ties,
        needed,
        *(tuple(int(i) for i in order if sign == np.sign(rounded[i]))[:_NUM_EXAMPLES] for sign in (1, -1, 0)),
    )


def _bounds(differences: Scores, is_binary: bool, num_baselines: int) -> tuple[float, float, float]:
    """Return the bounds of the 95% interval, and the upper bound of the wider one that decides whether the model is worse.

    For scores of 0 and 1 they are those of the score interval, for graded scores those of the bootstrap.
    """
    if len(differences) < 2:
        return -math.inf, math.inf, math.inf
    if is_binary:
        counts = statistics.count_pairs(differences)
        low, high = statistics.score_interval(counts.wins, counts.losses, len(differences))
        wider = 1 - SIGNIFICANCE / num_baselines
        return low, high, statistics.score_interval(counts.wins, counts.losses, len(differences), wider)[1]
    means = statistics.bootstrap_means(differences)
    low, high = statistics.interval(means, len(differences))
    _, worst_high = statistics.interval(means, len(differences), 1 - SIGNIFICANCE / num_baselines)
    return low, high, worst_high


def _sentence(
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
