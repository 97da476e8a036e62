"""Turns questions into prompts: for the tuned model as in training, for the base model as chat or text, with examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launcher.config.sections.data import DataSection
from launcher.data.sources.documents import Chat, Completion, Message
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
    """Token ids of prompts, one list each; the first `num_shared` tokens of all are equal. Answers end at `stop_strings`."""

    prompts: tuple[tuple[int, ...], ...]
    num_shared: int
    stop_strings: tuple[str, ...] = ()


class TunedPrompts:
    """Prompts as in training: the run's template and system message, no examples."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> None:
        self._encoder = Encoder(tokenizer, data)

    def write(self, questions: Sequence[EvalQuestion]) -> PromptBatch:
        return _batch([_encode(self._encoder, question) for question in questions], ())


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
        texts = [*(f"{_text_of(one)}{one.reference}" for one in examples), *(one.reference for one in others)]
        self._separator = next((one for one in _SEPARATORS if not any(one in text.strip() for text in texts)), _SEPARATORS[-1])

    @property
    def num_examples(self) -> int:
        return len(self._examples)

    @property
    def turn_end_ids(self) -> tuple[int, ...]:
        """The tokens with which the base model's own template ends a turn; empty if it has no template."""
        if not self._encoder.has_template:
            return ()
        chat = Chat("a turn", (Message("user", "question"), Message("assistant", "answer")))
        try:
            (encoded,) = self._encoder.encode([self._encoder.render(chat)])
        except DataError:
            # Some templates do not support such a chat.
            return ()
        return tuple(dict.fromkeys(int(encoded.ids[position]) for position in encoded.turn_ends))

    def forms(self, questions: Sequence[EvalQuestion]) -> tuple[str, ...]:
        """Return the forms in which the base model can be prompted: chat requires its own template."""
        is_chat = all(isinstance(question.document, Chat) for question in questions)
        return (CHAT, TEXT) if is_chat and self._encoder.has_template else (TEXT,)

    def write(self, questions: Sequence[EvalQuestion], style: PromptStyle) -> PromptBatch:
        """Return the prompts for questions in one style."""
        examples = self._examples[: style.shots]
        if style.form == CHAT:
            return _batch([self._write_chat(question, examples, style.instruction) for question in questions], ())
        prompts = [
            _encode(self._encoder, replace(question, document=Completion(question.where, text, "")))
            for question in questions
            for text in [self._make_text(question, examples, style.instruction)]
        ]
        has_labels = any(isinstance(question.document, Chat) for question in questions)
        return _batch(prompts, (self._separator, *((f"\n{_QUESTION}", "\nUser:") if has_labels else ())))

    def _write_chat(self, question: EvalQuestion, examples: Sequence[EvalQuestion], instruction: str) -> list[int]:
        """Return a chat after examples, with an instruction as the template supports it."""
        chat = question.document
        assert isinstance(chat, Chat)

        def write(messages: Sequence[Message]) -> list[int]:
            return _encode(self._encoder, replace(question, document=Chat(chat.where, tuple(messages), chat.tools)))

        shown = [message for example in examples for message in _turns(example)]
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

    def _make_text(self, question: EvalQuestion, examples: Sequence[EvalQuestion], instruction: str) -> str:
        system = _system_of(question)
        parts = [*filter(None, (system, instruction))]
        parts += [f"{_text_of(example)}{_spaced(example)}{example.reference.strip()}" for example in examples]
        return self._separator.join([*parts, _text_of(question)])


def _encode(encoder: Encoder, question: EvalQuestion) -> list[int]:
    document = question.document
    if isinstance(document, Chat):
        document = replace(document, messages=(*document.messages, Message("assistant", question.reference)))
    prompt = encoder.prompt(document)
    assert prompt is not None, "a question has a prompt"
    return prompt[1]


def _batch(prompts: Sequence[Sequence[int]], stop_strings: tuple[str, ...]) -> PromptBatch:
    # The last token of a prompt is never shared, because its logits determine the first token of the answer.
    num_shared = min((len(prompt) - 1 for prompt in prompts), default=0)
    if prompts:
        first = prompts[0]
        for prompt in prompts[1:]:
            num_shared = next((i for i in range(num_shared) if prompt[i] != first[i]), num_shared)
    return PromptBatch(tuple(map(tuple, prompts)), num_shared if len(prompts) > 1 else 0, stop_strings)


def _turns(example: EvalQuestion) -> list[Message]:
    if isinstance(example.document, Completion):
        return [Message("user", example.document.prompt), Message("assistant", example.reference)]
    messages = [message for message in example.document.messages if message.role != "system"]
    return [*messages, Message("assistant", example.reference)]


def _system_of(question: EvalQuestion) -> str:
    if isinstance(question.document, Completion):
        return ""
    return "\n\n".join(message.content for message in question.document.messages if message.role == "system")


def _text_of(question: EvalQuestion) -> str:
    """Return a question as text, up to where its answer begins."""
    if isinstance(question.document, Completion):
        return question.document.prompt
    messages = [message for message in question.document.messages if message.role != "system"]
    if len(messages) == 1:
        return f"{_QUESTION} {messages[0].content.strip()}\n{_ANSWER}"
    lines = [f"{_ROLES.get(message.role, message.role)}: {message.content.strip()}" for message in messages]
    return "\n".join([*lines, "Assistant:"])


def _spaced(example: EvalQuestion) -> str:
    """Return the text between an example's question and its answer: text has its own spaces."""
    if isinstance(example.document, Chat):
        return " "
    return "" if example.document.prompt[-1:].isspace() or example.reference[:1].isspace() is False else " "
