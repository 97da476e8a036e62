"""The section for evaluation while the model trains."""

from __future__ import annotations

from pydantic import Field, field_validator

from launcher.config.sections.data import ChecksSection, DataSection, RowSource, Source
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
        256, description="Evaluate on at most this many rows, spread evenly over the set's lengths. null: all."
    )

    @field_validator("name")
    @classmethod
    def _not_held_out(cls, value: str) -> str:
        if value == HELD_OUT:
            raise ValueError("names the held-out rows of the training data; choose another name")
        return value

    def as_data(self, data: DataSection) -> DataSection:
        """Return the settings of the data cache of this set: rows as `data` makes them, without what selects or refuses them."""
        shared = {name: getattr(self, name) for name in RowSource.model_fields}
        return data.model_copy(
            update={
                "path": None,
                "sources": (Source(**shared),),
                "eval_fraction": 0.0,
                "eval_path": None,
                "eval_split": None,
                "checks": _WITHOUT_SELECTION,
            }
        )


_WITHOUT_SELECTION = ChecksSection(
    held_out_in_train="keep", truncated="keep", dropped="keep", no_turn_end="keep", empty_answer="keep", unsure_border="drop"
)


class EvalSection(Section):
    """Evaluation while the model trains: the held-out rows of the training data, and sets of other rows."""

    every: Count = Field(0, description="Steps between evaluations; 0: only before and after training.")
    at_start: Flag = Field(True, description="Evaluate before the first step, as the baseline of later evaluations.")
    stop_after: Count = Field(
        0,
        description=(
            "Evaluations in a row without a lower loss of the set checkpoint.best_set after which training ends, as if the steps "
            "were done; 0: never. checkpoint.keep_best=1 keeps the best checkpoint."
        ),
    )
    sets: tuple[EvalSet, ...] = Field(
        (),
        description=(
            "Further sets, each with its own loss: 'eval.sets=[{name: support, path: support.jsonl}]'. Their rows are read as "
            "those of data.sources, and nothing of them is trained on."
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
