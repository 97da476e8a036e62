"""The section for `launcher evaluate`: answers of the tuned and the base model, and how they are scored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from launcher.config.sections.answer_metrics import AnswerMetrics
from launcher.config.sections.fields import Count, Name, PositiveInt, Text

# The empty instruction comes first, so it is kept unless another one scores higher on training rows.
DEFAULT_INSTRUCTIONS = (
    "",
    "Answer the last question. Write nothing but the answer, in the form in which the answers of this task are written.",
)


class EvaluateSection(AnswerMetrics):
    """`launcher evaluate`: which prompts are answered, how the base model is prompted, and how answers are scored."""

    sets: tuple[Name, ...] = Field(
        (), description="Sets to evaluate: held_out, and names of eval.sets. Empty: all of them that have prompts."
    )
    max_prompts: PositiveInt = Field(200, description="Prompts of each set, at most: a random choice that run.seed decides.")
    max_new_tokens: PositiveInt = Field(
        256, description="Tokens of an answer, at most. Prompts that leave less room in the model's context are left out."
    )
    shots: Literal["auto"] | Count = Field(
        "auto",
        description=(
            "Training rows that the base model sees as examples before the question. auto: the number with the best answers to "
            "other training rows, among 2, 4 and 8; 0: the base model is asked without examples only."
        ),
    )
    instructions: tuple[str, ...] = Field(
        DEFAULT_INSTRUCTIONS,
        min_length=1,
        description=(
            "Instructions for the base model, as system message or first lines; the best one on training rows is used. An empty "
            "text is none. The tuned model gets its prompts as in training."
        ),
    )
    selection_prompts: PositiveInt = Field(
        8, description="Training rows on which the number of examples and the instruction are chosen."
    )
    prompts_per_batch: PositiveInt = Field(32, description="Prompts that are answered together, on each GPU.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Type of the weights that answer. auto: fp32 on CPUs, model.dtype on GPUs."
    )
    vllm_python: Text | None = Field(
        None,
        description=(
            "Python interpreter of an environment with vLLM, which then generates the answers, such as /opt/vllm/bin/python. "
            "Unset: transformers generates them."
        ),
    )
    vllm_gpus: PositiveInt = Field(
        1, description="GPUs of a node over which vLLM divides a model that does not fit one; each such group answers a share."
    )

    @field_validator("metrics", "sets", "instructions")
    @classmethod
    def _no_repetition(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len({*value}) < len(value):
            raise ValueError("names something twice; write each entry once")
        return value
