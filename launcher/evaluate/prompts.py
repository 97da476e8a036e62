"""Turns questions into prompts: for the tuned model as in training, for the base model as chat or text, with examples.

A badly prompted baseline would flatter the tuned model, so the form, the number of examples and the instruction are chosen on
training rows. Two short rounds compare one choice at a time: first the form, then the instruction and the number of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from launcher.config.sections.data import DataSection
from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization.encoder import Encoder
from launcher.errors import DataError
from launcher.evaluate.questions import EvalQuestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT, TEXT = "chat", "text"
# Separators between examples in text. The chosen one occurs in no example and also ends an answer.
_SEPARATORS = ("\n\n", "\n\n\n", "\n###\n", "\n======\n")
_QUESTION, _ANSWER = "Question:", "Answer:"
_ROLES = {"user": "User", "assistant": "Assistant", "tool": "Tool"}
# The numbers of examples that evaluate.shots=auto chooses from.
AUTO_SHOTS = (2, 4, 8)
# Training rows on which the number of examples and the instruction are compared.
SELECTION_PROMPTS = 8
# Number of questions to render to check whether examples fit: those with the most characters.
NUM_LONGEST = 3


@dataclass(frozen=True)
class PromptStyle:
    """How the base model is prompted: as `chat` with its template or as `text`, after `shots` examples, with an instruction."""

    form: str
    shots: int
    instruction: str = ""

    def __str__(self) -> str:
        form = "chat template" if self.form == CHAT else "plain text"
        instruction = f"instruction {self.instruction!r}" if self.instruction else "no instruction"
        return f"{form}, {self.shots} examples, {instruction}"


@dataclass(frozen=True)
class PromptBatch:
    """Token ids of prompts, one list each. Answers end at `stop_strings`."""

    prompts: tuple[tuple[int, ...], ...]
    stop_strings: tuple[str, ...] = ()


def write_as_trained(encoder: Encoder, questions: Sequence[EvalQuestion]) -> PromptBatch:
    """Return the prompts for the tuned model: the run's template and system message, no examples."""
    return _make_batch([_encode_question(encoder, question) for question in questions], ())


class BasePrompts:
    """Prompts for the base model; `examples` are training questions with their answers, and `others` are further ones.

    Text stops at the separator between examples, which occurs in no answer to these questions, or where the model writes its own
    next question.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataSection,
        examples: Sequence[EvalQuestion],
        others: Sequence[EvalQuestion],
    ) -> None:
        # The questions already include the configured system message, and the base model uses its own template.
        self._encoder = Encoder(tokenizer, data.model_copy(update={"chat_template": None, "system": None}))
        self._examples = tuple(examples)
        texts = [*(f"{_write_question(one)}{one.reference}" for one in examples), *(one.reference for one in others)]
        self._separator = next((one for one in _SEPARATORS if not any(one in text.strip() for text in texts)), _SEPARATORS[-1])

    @property
    def num_examples(self) -> int:
        return len(self._examples)

    @property
    def turn_end_ids(self) -> tuple[int, ...]:
        """The tokens with which the base model's own template ends a turn; empty if it has no template."""
        if not self._encoder.has_template:
            return ()
        chat = Document("a turn", (Message("user", "question"), Message("assistant", "answer")))
        try:
            (encoded,) = self._encoder.encode([self._encoder.render(chat)])
        except DataError:
            # Some templates do not support such a chat.
            return ()
        return tuple(dict.fromkeys(int(encoded.ids[position]) for position in encoded.turn_ends))

    def forms(self, questions: Sequence[EvalQuestion]) -> tuple[str, ...]:
        """Return the forms in which the base model can be prompted: chat requires its own template."""
        is_chat = all(question.document.messages for question in questions)
        return (CHAT, TEXT) if is_chat and self._encoder.has_template else (TEXT,)

    def write(self, questions: Sequence[EvalQuestion], style: PromptStyle) -> PromptBatch:
        """Return the prompts for questions in one style."""
        examples = self._examples[: style.shots]
        if style.form == CHAT:
            return _make_batch([self._write_chat(question, examples, style.instruction) for question in questions], ())
        shown = []
        for example in examples:
            document, answer = example.document, example.reference
            # A space precedes the answer unless the text has its own.
            has_space = not document.messages and (document.prompt[-1:].isspace() or not answer[:1].isspace())
            shown.append(f"{_write_question(example)}{'' if has_space else ' '}{answer.strip()}")
        prompts = []
        for question in questions:
            system = "\n\n".join(message.content for message in question.document.messages if message.role == "system")
            parts = [*filter(None, (system, style.instruction)), *shown, _write_question(question)]
            text = Document(question.where, prompt=self._separator.join(parts))
            prompts.append(_encode_question(self._encoder, replace(question, document=text)))
        has_labels = any(question.document.messages for question in questions)
        return _make_batch(prompts, (self._separator, *((f"\n{_QUESTION}", "\nUser:") if has_labels else ())))

    def _write_chat(self, question: EvalQuestion, examples: Sequence[EvalQuestion], instruction: str) -> list[int]:
        """Return a chat after examples, with an instruction as the template supports it."""
        chat = question.document

        def write(messages: Sequence[Message]) -> list[int]:
            return _encode_question(self._encoder, replace(question, document=replace(chat, messages=tuple(messages))))

        shown: list[Message] = []
        for example in examples:
            asked = example.document.messages or (Message("user", example.document.prompt),)
            shown += [message for message in asked if message.role != "system"]
            shown.append(Message("assistant", example.reference))
        system = [message for message in chat.messages if message.role == "system"]
        rest = [message for message in chat.messages if message.role != "system"]
        if not instruction:
            return write([*system, *shown, *rest])
        text = "\n\n".join([*(message.content for message in system), instruction])
        try:
            return write([Message("system", text), *shown, *rest])
        except DataError:
            # Some templates do not support a system message.
            first, *others = [*shown, *rest]
            return write([replace(first, content=f"{text}\n\n{first.content}"), *others])


def _encode_question(encoder: Encoder, question: EvalQuestion) -> list[int]:
    document = question.document
    if document.messages:
        document = replace(document, messages=(*document.messages, Message("assistant", question.reference)))
    prompt = encoder.prompt(document)
    assert prompt is not None, "a question has a prompt"
    return prompt[1]


def _make_batch(prompts: Sequence[Sequence[int]], stop_strings: tuple[str, ...]) -> PromptBatch:
    return PromptBatch(tuple(map(tuple, prompts)), stop_strings)


def _write_question(question: EvalQuestion) -> str:
    """Return a question as text, up to where its answer begins."""
    if not question.document.messages:
        return question.document.prompt
    messages = [message for message in question.document.messages if message.role != "system"]
    if len(messages) == 1:
        return f"{_QUESTION} {messages[0].content.strip()}\n{_ANSWER}"
    lines = [f"{_ROLES.get(message.role, message.role)}: {message.content.strip()}" for message in messages]
    return "\n".join([*lines, "Assistant:"])


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
    forms: Sequence[str],
    shots: Sequence[int],
    instructions: Sequence[str],
    score_styles: Callable[[Sequence[PromptStyle]], Mapping[PromptStyle, float]],
) -> ChosenStyles:
    """Compare styles; `shots` are the numbers of examples to choose from, without 0.

    `score_styles` returns the mean score of each style on the same training rows.

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
    return ChosenStyles(_choose_best(zero_shot, tried), _choose_best(few_shot, tried) if few_shot else None, tried)


def _choose_best(styles: Sequence[PromptStyle], scores: Mapping[PromptStyle, float]) -> PromptStyle:
    return max(styles, key=lambda style: scores.get(style, 0.0))
