"""Which characters of a rendered chat are trained: what the assistant must write itself, up to and including its end of turn.

A template with generation marks ({% generation %} ... {% endgeneration %}) says so itself. With any other the borders are found
by rendering prefixes of the conversation and comparing; where that does not give them for certain, the template is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import jinja2
from transformers.utils import chat_template_utils

from launcher.data.sources import Chat, Message
from launcher.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last_turn", "all"]

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates write the day; tokens must not depend on when the cache is built. It is the day that Llama's write by default.
_TODAY = datetime(2024, 7, 26)
_REWRITES = "renders earlier messages otherwise once a later one follows"
_NOT_SURE = (
    "use a template with generation marks (data.chat_template=FILE), or train the last turn alone (data.train_on=last_turn), "
    "or change the row"
)
_MARK_ALL = (
    "set data.chat_template to a file with a template whose generation marks stand around all that the assistant says, and "
    "around nothing else"
)


@dataclass(frozen=True)
class TrainedSpan:
    """Trained characters start:end of a text; the end-of-turn token stands at turn_end:end (None: there is none)."""

    start: int
    end: int
    turn_end: int | None = None


class Template:
    """The chat template of a tokenizer, or `text` in its place; `name` is where the user finds it.

    Methods raise DataError, which names template and document.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special_texts: Sequence[str], text: str | None = None, name: str = ""
    ) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self.name = name or str(tokenizer.name_or_path)
        self._special_texts = [token for token in special_texts if token]
        self._special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        # Kinds of conversations whose generation marks were found to be right.
        self._rightly_marked: set[int] = set()

    def render(self, chat: Chat, num_messages: int | None = None, generation_prompt: bool = False) -> str:
        """The text of the first `num_messages` messages (None: of all)."""
        return self._render(chat, chat.messages[:num_messages], generation_prompt, marks=False)[0]

    def trained(self, chat: Chat, train_on: TrainOn) -> tuple[str, tuple[TrainedSpan, ...]]:
        """The chat's text and its trained spans in ascending order.

        `last_turn` is what the assistant writes after the last user message. A message's own weight wins over `train_on`.
        """
        if train_on == "all":
            return self._all(chat)
        return self._spans(chat, answers(chat, train_on))

    def _all(self, chat: Chat) -> tuple[str, tuple[TrainedSpan, ...]]:
        """Everything but the messages of weight 0."""
        text, left_out = self._spans(chat, [i for i, message in enumerate(chat.messages) if message.weight == 0])
        spans, start = [], 0
        for span in (*left_out, TrainedSpan(len(text), len(text))):
            if span.start > start:
                # What stands before a message that is left out ends with that message's header.
                ends_chat = span.start == len(text)
                spans.append(self._with_turn_end(text, start, len(text)) if ends_chat else TrainedSpan(start, span.start))
            start = span.end
        return text, tuple(spans)

    def _spans(self, chat: Chat, wanted: Sequence[int]) -> tuple[str, tuple[TrainedSpan, ...]]:
        """The chat's text and the spans of the messages with the numbers `wanted`."""
        if wanted and _MARK.search(self._source(chat)):
            return self._marked_spans(chat, wanted)
        full = self.render(chat)
        self._require_all(chat, full)
        return full, tuple(self._span(chat, full, i) for i in wanted)

    # Templates with generation marks

    def _marked_spans(self, chat: Chat, wanted: Sequence[int]) -> tuple[str, tuple[TrainedSpan, ...]]:
        text, marks = self._render(chat, chat.messages, generation_prompt=False, marks=True)
        self._require_all(chat, text)
        spans = []
        for i, own in self._own_marks(chat, text, marks, wanted).items():
            where = f"{chat.where}, messages[{i}]"
            if not own and _said_by(chat.messages[i]):
                self._refuse("does not mark what the assistant says here as generated", where, _MARK_ALL)
            if own and not _says(chat.messages[i], text, own):
                self._refuse("marks other text as generated than what the assistant says", where, _MARK_ALL)
            spans += [self._with_turn_end(text, start, end) for start, end in own if start < end]
        self._require_right_marks(chat, wanted)
        return text, tuple(spans)

    def _own_marks(
        self, chat: Chat, text: str, marks: list[tuple[int, int]], wanted: Sequence[int]
    ) -> dict[int, list[tuple[int, int]]]:
        """The marks of each message with a number in `wanted`."""
        turns = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
        if len(marks) == len(turns):
            paired = {i: [mark] for i, mark in zip(turns, marks, strict=True)}
            if all(_says(chat.messages[i], text, own) for i, own in paired.items()):
                return {i: paired[i] for i in wanted}
        # A message with several marks, or none: how many there are before and after each message tells which are whose.
        counts = {0: 0, len(chat.messages): len(marks)}
        for end in {border for i in wanted for border in (i, i + 1)} - counts.keys():
            counts[end] = len(self._render(chat, chat.messages[:end], generation_prompt=False, marks=True)[1])
        in_order = [counts[end] for end in sorted(counts)]
        if in_order != sorted(in_order):
            self._refuse("marks other parts of a message once a later one follows", chat.where)
        own = {i: marks[counts[i] : counts[i + 1]] for i in wanted}
        if len(wanted) == len(turns) and sum(map(len, own.values())) < len(marks):
            self._refuse("marks text as generated that the assistant does not say", chat.where, _MARK_ALL)
        return own

    def _require_right_marks(self, chat: Chat, wanted: Sequence[int]) -> None:
        """Refuse marks around what others say, and marks that leave out what the assistant says in the messages `wanted`.

        A text may stand in another message too, so unique ones are rendered in their place: once for all conversations with
        the same kinds of messages, as that takes as long as rendering the conversation itself.
        """
        kinds = tuple((m.role, bool(m.content.strip()), len(m.tool_calls), bool(m.reasoning_content)) for m in chat.messages)
        if (key := hash((kinds, bool(chat.tools), tuple(wanted)))) in self._rightly_marked:
            return
        messages = _with_unique_texts(chat)
        text, marks = self._render(chat, messages, generation_prompt=False, marks=True)
        generated = "".join(text[start:end] for start, end in marks)
        for i, message in enumerate(messages):
            where = f"{chat.where}, messages[{i}]"
            if message.role != "assistant" and (said := message.content.strip()) and said in generated:
                self._refuse(f"marks what the {message.role} says as generated", where, _MARK_ALL)
            arguments = [value for call in message.tool_calls for value in call["function"]["arguments"].values()]
            if i in wanted and not all(part in generated for part in (message.content.strip(), *arguments)):
                self._refuse("marks only a part of what the assistant says as generated", where, _MARK_ALL)
        self._rightly_marked.add(key)

    def _with_turn_end(self, text: str, start: int, end: int) -> TrainedSpan:
        written = text[start:end].rstrip()
        token = self._token_at_end(written)
        return TrainedSpan(start, end, start + len(written) - len(token) if token else None)

    # Templates without: what follows a rendered prefix

    def _span(self, chat: Chat, full: str, i: int) -> TrainedSpan:
        """Where message `i` stands in `full`, the whole chat.

        Text that the template puts between the prompt and the content (such as an empty think block) is part of the span. Some
        templates leave it, or the reasoning, out of earlier turns, so `full` may hold the message with or without it.
        """
        message, where = chat.messages[i], f"{chat.where}, messages[{i}]"
        if i == 0:
            remedy = "begin the conversation with a user message, or leave such out with data.checks.role_order=drop"
            raise DataError(Problem("the conversation begins with the assistant", chat.where, remedy=remedy))
        prefix = self.render(chat, i, generation_prompt=True)
        turn = full if i == len(chat.messages) - 1 else self.render(chat, i + 1)
        if not full.startswith(prefix) or not turn.startswith(prefix):
            self._refuse(_REWRITES, where)
        answer = turn[len(prefix) :].rstrip()
        token = self._token_at_end(answer)
        body = answer.removesuffix(token).rstrip()
        said = _said_by(message)
        places = [body.rfind(part) for part in said]
        if unwritten := [call for call in _calls(message) if call not in body]:
            self._refuse_part(f"does not write the call of the tool {unwritten[0]}", where)
        if min(places, default=0) < 0 or (not message.tool_calls and not body.endswith(said[0] if said else "")):
            self._refuse("changes the message, or puts text between it and the end of the turn", where)
        # What may be missing in front, once later messages follow, ends where the message itself begins.
        for left_out in range(min(places, default=len(body)) + 1):
            written = answer[left_out:]
            if full.startswith(written, len(prefix)):
                end = len(prefix) + len(written)
                return TrainedSpan(len(prefix), end, end - len(token) if token else None)
        self._refuse("renders this message otherwise once later ones follow", where)

    def _token_at_end(self, text: str) -> str:
        return next((token for token in self._special_texts if text.endswith(token)), "")

    # Rendering

    def _source(self, chat: Chat) -> str:
        if self._text is not None:
            return self._text
        if not self._tokenizer.chat_template:
            remedy = (
                "choose a model with a chat template (often named -Instruct), set data.chat_template to a file with one, "
                "or use the formats prompt_completion or text"
            )
            what = "the tokenizer has no chat template, which conversations need"
            raise DataError(Problem(what, chat.where, self.name, remedy))
        try:
            return str(self._tokenizer.get_chat_template(tools=list(chat.tools) or None))
        except ValueError as error:
            what = f"the tokenizer has several chat templates ({', '.join(self._tokenizer.chat_template)}), and no default one"
            remedy = "set data.chat_template to a file with the one that is meant"
            raise DataError(Problem(what, chat.where, self.name, remedy)) from error

    def _render(
        self, chat: Chat, messages: Sequence[Message], generation_prompt: bool, marks: bool, with_tools: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        source = self._source(chat)
        rows, tools = [_as_template_reads(message) for message in messages], (list(chat.tools) if with_tools else []) or None
        values = {"add_generation_prompt": generation_prompt, **self._special_tokens}
        try:
            compiled = _compiled(source)
            if not marks:
                return compiled.render(messages=rows, tools=tools, documents=None, **values), []
            texts, spans = chat_template_utils.render_jinja_template(
                conversations=[rows], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **values
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            what = f"the chat template refuses this conversation: {error}"
            remedy = "change the row, set data.chat_template to a file with a template that takes it, or leave out conversations "
            remedy += "whose roles are out of order with data.checks.role_order=drop"
            raise DataError(Problem(what, chat.where, self.name, remedy)) from error
        return texts[0], [tuple(span) for span in spans[0]]

    def _require_all(self, chat: Chat, text: str) -> None:
        """Refuse a template that leaves out what was said to the assistant, or what it thinks before its last answer."""
        for i, message in enumerate(chat.messages):
            if message.role in ("system", "user") and message.content.strip() not in text:
                self._refuse_part(f"leaves out or changes what the {message.role} says", f"{chat.where}, messages[{i}]")
        for i in answers(chat, "last_turn"):
            thought = (chat.messages[i].reasoning_content or "").strip()
            if i > _last_user(chat) and thought and text.count(thought) <= self._without_reasoning(chat, i).count(thought):
                self._refuse_part("leaves out or changes the assistant's reasoning", f"{chat.where}, messages[{i}]")
        # The same template without them: a tokenizer may have another one for chats without tools.
        if chat.tools and text == self._render(chat, chat.messages, False, marks=False, with_tools=False)[0]:
            self._refuse_part("leaves out the definitions of the tools", chat.where)
        self._require_calls_and_results(chat)

    def _require_calls_and_results(self, chat: Chat) -> None:
        """Refuse where they leave no trace in the text. What they say may be escaped there, or stand elsewhere too."""
        if not any(message.role == "tool" or message.tool_calls for message in chat.messages):
            return
        messages = _with_unique_texts(chat)
        text = self._render(chat, messages, generation_prompt=False, marks=False)[0]
        for i, message in enumerate(messages):
            where = f"{chat.where}, messages[{i}]"
            if message.role == "tool" and message.content.strip() not in text:
                self._refuse_part("leaves out what the tool answers", where)
            for function in (call["function"] for call in message.tool_calls):
                if not all(value in text for value in function["arguments"].values()):
                    name = function["name"]
                    self._refuse_part(f"does not write the call of the tool {name} with all of its arguments", where)

    def _without_reasoning(self, chat: Chat, i: int) -> str:
        messages = list(chat.messages)
        messages[i] = replace(messages[i], reasoning_content=None)
        return self.render(Chat(chat.where, tuple(messages), chat.tools))

    def _refuse_part(self, does: str, where: str) -> NoReturn:
        remedy = "set data.chat_template to a file with a template that writes it, or take it out of the row"
        raise DataError(Problem(f"the chat template {does}", where, self.name, remedy))

    def _refuse(self, does: str, where: str, remedy: str = _NOT_SURE) -> NoReturn:
        what = f"the chat template {does}, so the trained tokens cannot be told for certain"
        raise DataError(Problem(what, where, self.name, remedy))


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """What tokenizer.apply_chat_template compiles and keeps; rendered here, nothing has to be copied first."""
    compiled: jinja2.Template = chat_template_utils._compile_jinja_template(source)
    # Every rendering copies them, which takes long of Jinja's chained maps.
    compiled.globals = {**compiled.globals, "strftime_now": _TODAY.strftime}
    return compiled


def answers(chat: Chat, train_on: TrainOn) -> list[int]:
    """The numbers of the assistant's messages that are trained."""
    last_user = _last_user(chat)
    return [
        i
        for i, message in enumerate(chat.messages)
        if message.role == "assistant"
        and (bool(message.weight) if message.weight is not None else train_on != "last_turn" or i > last_user)
    ]


def _last_user(chat: Chat) -> int:
    return max((i for i, message in enumerate(chat.messages) if message.role == "user"), default=-1)


def _said_by(message: Message) -> list[str]:
    """Texts that must stand in whatever a template makes of an assistant's message."""
    return [text for text in (message.content.strip(), *_calls(message)) if text]


def _calls(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    return [call["function"]["name"] for call in message.tool_calls]


def _says(message: Message, text: str, marks: Sequence[tuple[int, int]]) -> bool:
    """True where what stands in the `marks` of `text` may be what a template makes of the message."""
    marked = "".join(text[start:end] for start, end in marks)
    return all(part in marked for part in _said_by(message))


def _with_unique_texts(chat: Chat) -> list[Message]:
    """The messages with a text in place of each content and of each argument of a call that stands nowhere else."""
    return [
        replace(
            message,
            content=f"launcher-{i}-end" if message.content.strip() else message.content,
            tool_calls=tuple(_with_unique_arguments(call, f"{i}-{j}") for j, call in enumerate(message.tool_calls)),
        )
        for i, message in enumerate(chat.messages)
    ]


def _with_unique_arguments(call: dict[str, Any], place: str) -> dict[str, Any]:
    names = call["function"]["arguments"]
    arguments = {name: f"launcher-{place}-{k}-end" for k, name in enumerate(names)}
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _as_template_reads(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        made["tool_calls"] = list(message.tool_calls)
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        # Templates read it under either name.
        made["reasoning_content"] = made["thinking"] = message.reasoning_content
    return made


def with_system(chat: Chat, system: str | None) -> Chat:
    """The chat with `system` in place of its own system message; None leaves it as it is."""
    if system is None:
        return chat
    own = chat.messages[1:] if chat.messages[0].role == "system" else chat.messages
    return Chat(chat.where, (Message("system", system), *own), chat.tools)
