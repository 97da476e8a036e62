"""`--min-gain METRIC:BASELINE:GAIN`: the gain over a baseline that an evaluation must show, for scripts and CI."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.errors import ConfigError, Problem, did_you_mean
from launcher.tracking.verdicts import BaselineComparison, ComparisonOutcome, EvaluationVerdict, format_difference

FEW_SHOT, BASE = "few-shot", "base"
_WHERE = "command line"
_BASELINE = re.compile(r"\d+-shot")
_FORM = "write --min-gain METRIC:BASELINE:GAIN, such as exact_match:few-shot:0.05"


@dataclass(frozen=True)
class MinimumGain:
    """The lower bound of the difference from `baseline` in `metric` must be at least `gain`.

    `baseline` is `0-shot`, `8-shot` and so on, `few-shot` for every baseline with examples, or `base` for tasks.
    """

    metric: str
    baseline: str
    gain: float

    def __str__(self) -> str:
        return f"{self.metric}:{self.baseline}:{self.gain:g}"

    def failure(self, verdict: EvaluationVerdict) -> str | None:
        """Return why a verdict does not show the gain, or None if it does."""
        compared = [one for one in verdict.comparisons if one.metric == self.metric and self._is_about(one.baseline)]
        if not compared:
            baselines = ", ".join(dict.fromkeys(one.baseline for one in verdict.comparisons))
            return f"--min-gain {self} did not hold: {self.baseline} was not evaluated; baselines are {baselines or 'none'}"
        return next((reason for one in compared if (reason := self._shortfall(one))), None)

    def _is_about(self, baseline: str) -> bool:
        return baseline != "0-shot" if self.baseline == FEW_SHOT else baseline == self.baseline

    def _shortfall(self, one: BaselineComparison) -> str | None:
        shown = f"the difference to {one.baseline} by {one.metric} is {format_difference(one)}"
        if one.low is None:
            return f"--min-gain {self} did not hold: there are too few prompts for a lower bound"
        if one.low < self.gain:
            return f"--min-gain {self} did not hold: {shown}, its lower bound is below {self.gain:g}"
        # If few pairs differ, the exact test decides too.
        if self.gain > 0 and one.p_value is not None and one.outcome != ComparisonOutcome.BETTER:
            return (
                f"--min-gain {self} did not hold: {shown}, but with {one.wins + one.losses} answers that differ it may be chance"
            )
        return None


def parse_minimum_gains(texts: Iterable[str], metrics: Sequence[str] | None) -> tuple[MinimumGain, ...]:
    """Parse the values of --min-gain; `metrics` are the computed metrics, None for tasks, which have their own.

    Raises:
        ConfigError: with every invalid value.
    """
    gains, problems = [], []
    for text in texts:
        # The metric may be path/to/file.py:function.
        metric, baseline, number = ([""] * 3 + text.rsplit(":", 2))[-3:]
        gain = _parse_number(number)
        is_baseline = baseline == BASE if metrics is None else baseline == FEW_SHOT or _BASELINE.fullmatch(baseline)
        if not metric or gain is None or not is_baseline:
            baselines = (
                f"of tasks is {BASE}" if metrics is None else f"is 0-shot, {FEW_SHOT}, or a number of examples such as 8-shot"
            )
            problems.append(Problem("--min-gain cannot be parsed", _WHERE, text, f"{_FORM}; a baseline {baselines}"))
        elif metrics is not None and metric not in metrics:
            remedy = f"{did_you_mean(metric, metrics)} metrics of this evaluation are {', '.join(metrics)}".strip()
            problems.append(Problem(f"--min-gain names {metric}, which is not computed", _WHERE, text, remedy))
        else:
            gains.append(MinimumGain(metric, baseline, gain))
    if problems:
        raise ConfigError(problems)
    return tuple(gains)


def _parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
