"""The section for `launcher evaluate`: answers of the tuned and the base model, and how they are scored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launcher.config.sections.answer_metrics import AnswerMetrics
from launcher.config.sections.fields import Count, PositiveInt, Text

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
