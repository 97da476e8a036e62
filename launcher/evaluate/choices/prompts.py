"""Questions with each of their choices as documents in which only the choice is scored. Without torch.

The tuned model sees a question as in training. The base model sees it as in `evaluate`: as chat or text, after examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launcher.config.sections.data import DataSection
from launcher.data.sources import Completion
from launcher.data.tokenization.encoder import Encoder, RenderedDocument
from launcher.evaluate.choices.questions import ChoiceQuestion
from launcher.evaluate.questions import EvalQuestion, split_question


@dataclass(frozen=True)
class ChoiceTokens:
    """A question with one of its choices: token ids, and which of them belong to the choice."""

    ids: tuple[int, ...]
    is_choice: tuple[bool, ...]


def to_eval_question(question: ChoiceQuestion, encoder: Encoder, data: DataSection, completions: str) -> EvalQuestion:
    """Return a question with its right choice, written as such a row in training."""
    row = Completion(question.where, question.question, f" {question.choices[question.answer]}")
    written = split_question(encoder.write_as_chat(row, completions), data.system)
    assert written is not None
    return written


def encode_choices(encoder: Encoder, rendered: Sequence[RenderedDocument]) -> list[ChoiceTokens | None]:
    """Tokenize documents that end with a choice; None if the tokenizer cannot separate the choice from what precedes it."""
    has_end = encoder.tokenizer.eos_token_id is not None
    encoded = []
    for document, tokens in zip(rendered, encoder.encode(rendered), strict=True):
        # The end-of-text token is not part of the choice.
        end = len(tokens.ids) - (1 if document.raw and has_end else 0)
        is_choice = np.asarray(tokens.trained[:end], dtype=bool)
        usable = not tokens.is_unsure and is_choice.any()
        encoded.append(ChoiceTokens(tuple(tokens.ids[:end].tolist()), tuple(is_choice.tolist())) if usable else None)
    return encoded
