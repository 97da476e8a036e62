"""The section for evaluation while the model trains."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from launcher.config.sections.data import RowSource
from launcher.config.sections.fields import Count, Flag, Name, PositiveInt, Section

HELD_OUT = "held_out"
"""Name of the held-out rows of the training data among the evaluation sets."""


class EvalSet(RowSource):
    """Rows of other files whose loss is computed while the model trains."""

    name: Name = Field(description="Name of the set in metrics (eval/NAME/loss), events and reports.")
    every: Count | None = Field(
        None, description="Steps between evaluations of the set; 0: only before and after training. Unset: eval.every."
    )
    max_rows: PositiveInt | None = Field(
        256, description="Evaluate on at most this many packed rows, spread evenly over the lengths of documents. null: all."
    )

    @property
    def rows(self) -> dict[str, Any]:
        """The settings that say which rows the set has, and how they are read."""
        return self.model_dump(exclude={"every", "max_rows"})

    @field_validator("name")
    @classmethod
    def _not_held_out(cls, value: str) -> str:
        if value == HELD_OUT:
            raise ValueError("names the held-out rows of the training data; choose another name")
        return value


class EvalSection(Section):
    """Evaluation while the model trains: the held-out rows of the training data, and sets of other rows."""

    every: Count = Field(0, description="Steps between evaluations; 0: only before and after training.")
    at_start: Flag = Field(True, description="Evaluate before the first step, as the baseline of later evaluations.")
    stop_after: Count = Field(
        0,
        description=(
            "Evaluations in a row without a lower loss of the set checkpoint.best_set after which training ends; 0: never. With "
            "checkpoint.keep_best=1, the weights of the best step are saved and exported, without it the last ones."
        ),
    )
    sets: tuple[EvalSet, ...] = Field(
        (),
        description=(
            "Further sets, each with its own loss: 'eval.sets=[{name: support, path: support.jsonl}]'. Their rows are read as "
            "those of data.sources and have no part in training; rows that the training data has as well are not looked for."
        ),
    )
    sample: Flag = Field(
        False, description="Answer one held-out question before and after training (models that fit on one device)."
    )
    sample_max_tokens: PositiveInt = Field(48, description="Maximum length of that answer, in tokens.")

    @field_validator("sets")
    @classmethod
    def _different_names(cls, value: tuple[EvalSet, ...]) -> tuple[EvalSet, ...]:
        names = [one.name for one in value]
        if len({*names}) < len(names):
            raise ValueError(f"uses a name twice ({', '.join(names)}); give every set its own name")
        return value
