"""The section for evaluation during training."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from launcher.config.sections.data import GENERAL_TEXT, RowSource, without_credentials
from launcher.config.sections.fields import Count, Flag, Name, PositiveInt, Section, Text

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
    def _not_held_out(cls, value: str) -> str:
        if value == HELD_OUT:
            raise ValueError("names the held-out rows of the training data; choose another name")
        return value


class EvalSection(Section):
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
    sets: tuple[EvalSet, ...] = Field(
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

    @field_validator("forgetting")
    @classmethod
    def _no_credentials(cls, value: bool | str) -> bool | str:
        return without_credentials(value) if isinstance(value, str) else value

    @field_validator("sets")
    @classmethod
    def _different_names(cls, value: tuple[EvalSet, ...]) -> tuple[EvalSet, ...]:
        names = [one.name for one in value]
        if len({*names}) < len(names):
            raise ValueError(f"uses a name twice ({', '.join(names)}); give every set its own name")
        return value

    @model_validator(mode="after")
    def _one_forgetting(self) -> EvalSection:
        if self.forgetting is not False and any(one.name == FORGETTING for one in self.sets):
            raise ValueError(f"eval.forgetting and one of eval.sets are both called {FORGETTING}; give the set another name")
        return self
