"""Chooses how to prompt the base model: chat or text, the number of examples, the instruction. On training rows, without torch.

A badly prompted baseline would flatter the tuned model. Two short rounds compare one choice at a time: first the form, then the
instruction and the number of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.evaluate.prompting import PromptStyle

# The numbers of examples that evaluate.shots=auto chooses from.
AUTO_SHOTS = (2, 4, 8)
# Training rows on which the number of examples and the instruction are compared.
SELECTION_PROMPTS = 8
# Number of questions to render to check whether examples fit: those with the most characters.
NUM_LONGEST = 3

# Returns the mean score of each style on the same training rows.
ScoreStyles = Callable[[Sequence[PromptStyle]], Mapping[PromptStyle, float]]


def list_shots(setting: Literal["auto"] | int) -> tuple[int, ...]:
    """Return the numbers of examples that evaluate.shots allows, without 0."""
    if setting == "auto":
        return AUTO_SHOTS
    return (setting,) if setting else ()


@dataclass(frozen=True)
class ChosenStyles:
    """The best style without examples and with examples; None if not used. `scores` are those of all styles that were tried."""

    zero_shot: PromptStyle
    few_shot: PromptStyle | None
    scores: Mapping[PromptStyle, float]


def choose_styles(
    forms: Sequence[str], shots: Sequence[int], instructions: Sequence[str], score_styles: ScoreStyles
) -> ChosenStyles:
    """Compare styles; `shots` are the numbers of examples to choose from, without 0.

    Of equal scores the first one wins, which has no instruction; among numbers of examples, the largest wins.
    """
    numbers = sorted(shots)
    middle = numbers[len(numbers) // 2] if numbers else 0
    first, *others = instructions
    tried: dict[PromptStyle, float] = {}
    by_form = [PromptStyle(form, count, first) for form in forms for count in (0, *([middle] if numbers else ()))]
    if len(forms) > 1:
        tried |= score_styles(by_form)
    zero_form = max(forms, key=lambda form: tried.get(PromptStyle(form, 0, first), 0.0))
    few_form = max(forms, key=lambda form: tried.get(PromptStyle(form, middle, first), 0.0))
    zero_shot = [PromptStyle(zero_form, 0, text) for text in instructions]
    few_shot = [PromptStyle(few_form, count, first) for count in reversed(numbers)]
    few_shot += [PromptStyle(few_form, middle, text) for text in others if numbers]
    if len(zero_shot) > 1 or len(few_shot) > 1:
        tried |= score_styles([style for style in (*zero_shot, *few_shot) if style not in tried])
    return ChosenStyles(_best(zero_shot, tried), _best(few_shot, tried) if few_shot else None, tried)


def _best(styles: Sequence[PromptStyle], scores: Mapping[PromptStyle, float]) -> PromptStyle:
    return max(styles, key=lambda style: scores.get(style, 0.0))
