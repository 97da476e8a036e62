"""The settings for scoring answers: names of metrics, and the settings that some of them need."""

from __future__ import annotations

import re
from typing import Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from launcher.config.sections.fields import Section, Text
from launcher.errors import did_you_mean

MetricName = Literal[
    "exact_match",
    "token_f1",
    "rouge_l",
    "numeric",
    "regex",
    "valid_json",
    "json_schema",
    "field_f1",
    "label_accuracy",
    "stopped",
    "no_repetition",
]
METRIC_NAMES: tuple[str, ...] = get_args(MetricName)
# The setting that a metric cannot be used without.
NEEDED_SETTINGS = {"regex": "pattern", "json_schema": "json_schema", "label_accuracy": "labels"}
_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
_KNOWN = f"metrics are {', '.join(METRIC_NAMES)}, and functions of your own as path/to/file.py:function"


def split_function(metric: str) -> tuple[str, str] | None:
    """Return file and function of a metric such as `path/to/file.py:function`; None for the name of a metric."""
    match = _FUNCTION.fullmatch(metric)
    return None if match is None else (match["file"], match["function"])


class AnswerMetrics(Section):
    """How answers are scored. Part of the section `evaluate`."""

    metrics: tuple[Text, ...] = Field(
        ("exact_match",),
        min_length=1,
        description=(
            f"Metrics that score each answer from 0 to 1: {', '.join(METRIC_NAMES)}, or your own function as "
            "path/to/file.py:function. The first metric decides the verdict and how the base model is prompted."
        ),
    )
    pattern: str | None = Field(
        None,
        description=(
            "Regular expression for the metric regex: an answer scores 1 if it matches. With a group (?P<answer>...), the "
            "group's last match must equal the reference."
        ),
    )
    json_schema: Text | None = Field(None, description="File with the JSON schema for the metric json_schema.")
    labels: tuple[Text, ...] = Field(
        (), description="Labels for the metric label_accuracy: the first one that an answer names counts."
    )

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METRIC_NAMES and split_function(name) is None:
                guess = did_you_mean(name, METRIC_NAMES)
                raise ValueError(f"contains {name!r}, which is not a metric; {f'{guess} ' if guess else ''}{_KNOWN}")
        return value

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"is not a regular expression ({error}); see docs.python.org/3/library/re.html") from None
        return value

    @model_validator(mode="after")
    def _options(self) -> Self:
        for metric, setting in NEEDED_SETTINGS.items():
            if metric in self.metrics and not getattr(self, setting):
                raise ValueError(f"the metric {metric} needs evaluate.{setting}; set it, or leave out the metric")
        return self
