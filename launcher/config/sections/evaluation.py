"""The sections for evaluation: losses during training (`eval`), and answers of the tuned and the base model (`evaluate`)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from launcher.config.sections.data import GENERAL_TEXT, RowSource, without_credentials
from launcher.config.sections.fields import Count, Flag, Name, PositiveInt, SettingsSection, Text, with_own_names
from launcher.errors import did_you_mean

HELD_OUT = "held_out"
"""Name of the held-out rows of the training data among the evaluation sets."""
FORGETTING = "forgetting"
"""Name of the set of eval.forgetting."""


class EvalSet(RowSource):
    """Rows of other files whose loss is computed during training."""

    name: Name = Field(description="Name of the set in metrics (eval/NAME/loss), events and reports.")
    every: Count | None = Field(
        None, description="Steps between evaluations of the set; 0: only before and after training. Unset: eval.every."
    )
    max_rows: PositiveInt | None = Field(
        256, description="Evaluate on at most this many packed rows, spread evenly over the lengths of documents. null: all."
    )

    @property
    def rows(self) -> dict[str, Any]:
        """The settings that define which rows the set has and how they are read."""
        return self.model_dump(exclude={"every", "max_rows"})

    @field_validator("name")
    @classmethod
    def _refuse_reserved_name(cls, value: str) -> str:
        if value == HELD_OUT:
            raise ValueError("names the held-out rows of the training data; choose another name")
        return value


class EvalSection(SettingsSection):
    """Evaluation during training: the held-out rows of the training data, and sets of other rows."""

    every: Count = Field(0, description="Steps between evaluations; 0: only before and after training.")
    at_start: Flag = Field(True, description="Evaluate before the first step, as the baseline for later evaluations.")
    stop_after: Count = Field(
        0,
        description=(
            "Training ends after this many consecutive evaluations without a lower loss on checkpoint.best_set; 0: never. "
            "With checkpoint.keep_best=1, the weights of the best step are kept and exported; without it, the last ones are."
        ),
    )
    answers_every: Count = Field(
        0,
        description=(
            "Steps between checkpoints whose answers to prompts are compared with the base model's during the run, as in "
            "`evaluate`; a multiple of checkpoint.save_every; 0: none. Exported weights answer, not the training engine: on CPUs "
            "during training at low priority, on GPUs of this machine after training, on Slurm and Ray in a separate allocation."
        ),
    )
    sets: Annotated[tuple[EvalSet, ...], with_own_names("set")] = Field(
        (),
        description=(
            "Additional evaluation sets, each with its own loss: 'eval.sets=[{name: support, path: support.jsonl}]'. Their rows "
            "are read like those of data.sources and are not trained on; nothing checks whether the training data contains them "
            "too."
        ),
    )
    forgetting: Flag | Text = Field(
        False,
        description=(
            f"General text whose loss shows what the model forgets: a path, or true for {GENERAL_TEXT}, 200 KB of English that "
            "comes with the launcher. It becomes an evaluation set named forgetting."
        ),
    )
    sample: Flag = Field(
        False, description="Answer one held-out question before and after training (models that fit on one device)."
    )

    @property
    def sets_by_setting(self) -> dict[str, EvalSet]:
        """All sets, by the setting that defines their rows."""
        sets = {f"eval.sets[{number}]": one for number, one in enumerate(self.sets)}
        if self.forgetting is not False:
            path = GENERAL_TEXT if self.forgetting is True else self.forgetting
            sets["eval.forgetting"] = EvalSet(name=FORGETTING, path=path)
        return sets

    @property
    def all_sets(self) -> tuple[EvalSet, ...]:
        """The sets of eval.sets, and the set of eval.forgetting."""
        return tuple(self.sets_by_setting.values())

    @property
    def intervals(self) -> dict[str, int]:
        """The steps between evaluations, by set; the held-out rows come first, even if there are none."""
        return {HELD_OUT: self.every, **{one.name: self.every if one.every is None else one.every for one in self.all_sets}}

    @field_validator("forgetting")
    @classmethod
    def _refuse_credentials(cls, value: bool | str) -> bool | str:
        return without_credentials(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _refuse_second_forgetting(self) -> EvalSection:
        if self.forgetting is not False and any(one.name == FORGETTING for one in self.sets):
            raise ValueError(f"eval.forgetting and one of eval.sets are both called {FORGETTING}; give the set another name")
        return self


MetricName = Literal[
    "exact_match",
    "token_f1",
    "rouge_l",
    "numeric",
    "regex",
    "valid_json",
    "field_f1",
    "label_accuracy",
    "stopped",
    "no_repetition",
]
METRIC_NAMES: tuple[str, ...] = get_args(MetricName)
# The setting that a metric cannot be used without.
NEEDED_SETTINGS = {"regex": "pattern", "label_accuracy": "labels"}
_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
_KNOWN = f"metrics are {', '.join(METRIC_NAMES)}, and functions of your own as path/to/file.py:function"


def split_function(metric: str) -> tuple[str, str] | None:
    """Return file and function of a metric such as `path/to/file.py:function`; None for the name of a metric."""
    match = _FUNCTION.fullmatch(metric)
    return None if match is None else (match["file"], match["function"])


class AnswerMetrics(SettingsSection):
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
    labels: tuple[Text, ...] = Field(
        (), description="Labels for the metric label_accuracy: the first one that an answer names counts."
    )

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METRIC_NAMES and split_function(name) is None:
                guess = did_you_mean(name, METRIC_NAMES)
                raise ValueError(f"contains {name!r}, which is not a metric; {f'{guess} ' if guess else ''}{_KNOWN}")
        return value

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"is not a regular expression ({error}); see docs.python.org/3/library/re.html") from None
        return value

    @model_validator(mode="after")
    def _require_options(self) -> Self:
        for metric, setting in NEEDED_SETTINGS.items():
            if metric in self.metrics and not getattr(self, setting):
                raise ValueError(f"the metric {metric} needs evaluate.{setting}; set it, or leave out the metric")
        return self


# The empty instruction comes first, so it is kept unless another one scores higher on training rows.
DEFAULT_INSTRUCTIONS = (
    "",
    "Answer the last question. Write nothing but the answer, in the form in which the answers of this task are written.",
)


class EvaluateSection(AnswerMetrics):
    """`launcher evaluate`: which prompts are answered, how the base model is prompted, and how answers are scored."""

    max_prompts: PositiveInt = Field(200, description="Maximum prompts per set, sampled with run.seed.")
    max_new_tokens: PositiveInt = Field(
        256, description="Maximum tokens per answer. Prompts that leave less room in the model's context are skipped."
    )
    shots: Literal["auto"] | Count = Field(
        "auto",
        description=(
            "Training rows that the base model sees as examples before the question. auto: 2, 4 or 8, whichever gives the best "
            "answers to other training rows; 0: ask the base model only without examples."
        ),
    )
    instructions: tuple[str, ...] = Field(
        DEFAULT_INSTRUCTIONS,
        min_length=1,
        description=(
            "Instructions for the base model, as a system message or first lines; the one that scores best on training rows is "
            "used. An empty text means no instruction. The tuned model gets its prompts as in training."
        ),
    )
    prompts_per_batch: PositiveInt = Field(32, description="Prompts answered together on each GPU.")
    vllm_python: Text | None = Field(
        None,
        description=(
            "Python interpreter of an environment with vLLM, which then generates the answers, such as /opt/vllm/bin/python. "
            "Unset: transformers generates them."
        ),
    )
    vllm_gpus: PositiveInt = Field(
        1,
        description=(
            "GPUs of a node over which vLLM splits a model that does not fit on one; each such group answers a share of the "
            "prompts."
        ),
    )
