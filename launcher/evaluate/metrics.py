"""The table of metrics: how an answer is scored against its reference. Without torch.

Every score is a fraction from 0 to 1, and higher is better. To add a metric, add a row to METRICS and its name to `MetricName`
in launcher/config/sections/evaluation.py.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.evaluate import answer_text
from launcher.evaluate.answer_text import NotJson


@dataclass(frozen=True)
class GeneratedAnswer:
    """A model's answer. `is_stopped` is False if the maximum length cut the answer off."""

    text: str
    is_stopped: bool
    num_tokens: int


@dataclass(frozen=True)
class MetricOptions:
    """Settings for the metrics that need them. `schema` is a JSON schema as JSON text."""

    pattern: str = ""
    schema: str = ""
    labels: tuple[str, ...] = ()


_Score = Callable[[GeneratedAnswer, str, MetricOptions], float]
_NO_OPTIONS = MetricOptions()


@dataclass(frozen=True)
class AnswerMetric:
    """One way to score an answer.

    Attributes:
        compute: returns the score of an answer, given the reference and the options.
        reference_problem: returns why a reference is unsuitable for comparison; empty if it is suitable.
        with_thoughts: whether it scores what a reasoning model writes before its answer, too.
        may_hang: whether an answer may make it take forever, so that it runs in a process with a time limit.
    """

    compute: _Score
    reference_problem: Callable[[str, MetricOptions], str] = lambda reference, options: ""
    with_thoughts: bool = False
    may_hang: bool = False

    def score(self, answer: GeneratedAnswer, reference: str, options: MetricOptions = _NO_OPTIONS) -> float:
        """Return the score of one answer, from 0 to 1; higher is better."""
        return float(self.compute(answer, reference, options))


def _exact_match(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    return answer_text.normalized_words(answer.text) == answer_text.normalized_words(reference)


def _token_f1(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    counts = (Counter(answer_text.split_words(text)) for text in (answer.text, reference))
    return answer_text.multiset_f1(*counts)


def _numeric(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    number = answer_text.final_number(answer.text)
    if answer_text.is_joined_number(answer.text, with_ranges=False):
        return False
    return number is not None and number == answer_text.final_number(reference)


def _no_number(reference: str, options: MetricOptions) -> str:
    if answer_text.final_number(reference) is None:
        return "has no number"
    if answer_text.is_joined_number(reference, with_ranges=True):
        return "ends with a time, a date, a range, a power or a decimal comma, which are not compared as numbers"
    return ""


def _regex(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    """With a group named `answer`, compare its last match with the reference; without, return whether the pattern matches."""
    found = _last_match(answer.text, options)
    if found is None or "answer" not in found.groupdict():
        return found is not None
    expected = _last_match(reference, options)
    words = (found["answer"], reference if expected is None else expected["answer"])
    return answer_text.normalized_words(words[0] or "") == answer_text.normalized_words(words[1] or "")


def _last_match(text: str, options: MetricOptions) -> re.Match[str] | None:
    return max(re.finditer(options.pattern, text), key=lambda one: one.end(), default=None)


def _valid_json(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    try:
        answer_text.parse_json(answer.text)
    except NotJson:
        return False
    return True


@functools.cache
def schema_validator(schema: str) -> Any:
    """Return the validator for a JSON schema, given as JSON text."""
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY

    parsed = json.loads(schema)
    # Without its own registry, the validator downloads what $ref names.
    return validator_for(parsed)(parsed, registry=REGISTRY)


def _json_schema(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    try:
        value = answer_text.parse_json(answer.text)
    except NotJson:
        return False
    try:
        return bool(schema_validator(options.schema).is_valid(value))
    except (RecursionError, OverflowError):
        # The answer is nested too deeply, or contains a number that `multipleOf` cannot divide.
        return False


def _field_f1(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    try:
        fields = answer_text.json_fields(answer_text.parse_json(answer.text))
    except NotJson:
        return False
    return answer_text.multiset_f1(fields, answer_text.json_fields(answer_text.parse_json(reference)))


def _no_json(reference: str, options: MetricOptions) -> str:
    try:
        answer_text.parse_json(reference)
    except NotJson as error:
        return f"is not JSON ({error})"
    return ""


def _label_accuracy(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    labels = options.labels or (reference,)
    return answer_text.first_label(answer.text, labels) == answer_text.first_label(reference, labels)


def _no_label(reference: str, options: MetricOptions) -> str:
    if answer_text.first_label(reference, options.labels or (reference,)) is None:
        return f"has none of the labels {', '.join(options.labels[:10])}" if options.labels else "is empty"
    return ""


# Keyed by the name in evaluate.metrics.
METRICS: dict[str, AnswerMetric] = {
    "exact_match": AnswerMetric(_exact_match),
    "token_f1": AnswerMetric(_token_f1),
    "rouge_l": AnswerMetric(lambda answer, reference, options: answer_text.rouge_l(answer.text, reference)),
    "numeric": AnswerMetric(_numeric, _no_number),
    "regex": AnswerMetric(_regex, may_hang=True),
    "valid_json": AnswerMetric(_valid_json),
    "json_schema": AnswerMetric(_json_schema, may_hang=True),
    "field_f1": AnswerMetric(_field_f1, _no_json),
    "label_accuracy": AnswerMetric(_label_accuracy, _no_label),
    "stopped": AnswerMetric(lambda answer, reference, options: answer.is_stopped),
    "no_repetition": AnswerMetric(
        lambda answer, reference, options: 1 - answer_text.repeated_share(answer.text), with_thoughts=True
    ),
}
