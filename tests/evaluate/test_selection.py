"""The prompt style of the base model is selected by its scores on training rows."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.evaluate.prompting import CHAT, TEXT, PromptStyle
from launcher.evaluate.selection import choose_styles


def test_the_best_form_number_of_examples_and_instruction_are_found() -> None:
    asked: list[PromptStyle] = []

    def score(styles: Sequence[PromptStyle]) -> dict[PromptStyle, float]:
        asked.extend(styles)
        return {
            style: 0.5 * (style.form == TEXT)
            + 0.1 * (style.shots == 8)
            + 0.3 * (style.instruction == "Be brief." and not style.shots)
            for style in styles
        }

    chosen = choose_styles((CHAT, TEXT), (2, 4, 8), ("", "Be brief."), score)
    assert chosen.zero_shot == PromptStyle(TEXT, 0, "Be brief.")
    assert chosen.few_shot == PromptStyle(TEXT, 8)
    assert len(asked) == len({*asked}) == len(chosen.scores), "nothing is tried twice"
    assert len(asked) <= 10


def test_of_equal_scores_the_plainest_question_and_the_most_examples_win() -> None:
    chosen = choose_styles((CHAT, TEXT), (2, 4, 8), ("", "Be brief."), lambda styles: dict.fromkeys(styles, 0.0))
    assert (chosen.zero_shot, chosen.few_shot) == (PromptStyle(CHAT, 0), PromptStyle(CHAT, 8))


def test_nothing_is_tried_where_there_is_no_choice() -> None:
    def score(styles: Sequence[PromptStyle]) -> dict[PromptStyle, float]:
        raise AssertionError(styles)

    chosen = choose_styles((TEXT,), (3,), ("",), score)
    assert (chosen.zero_shot, chosen.few_shot) == (PromptStyle(TEXT, 0), PromptStyle(TEXT, 3))
    assert choose_styles((TEXT,), (), ("",), score).few_shot is None
