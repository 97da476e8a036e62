"""Determines which characters of a rendered chat are trained: the assistant's text, up to and including its end of turn.

A template with generation marks ({% generation %} ... {% endgeneration %}) marks them. For any other template, rendered prefixes
of the conversation are compared; a template is refused if the result is ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization.chat_template import ChatTemplate, TrainOn, find_trained_messages, with_unique_texts
from launcher.errors import DataError

_REWRITES = "renders earlier messages differently once a later one follows"
_REASONING_START = re.compile(r"<[^<>\s]*think[^<>\s]*>\s*$", re.IGNORECASE)
_MARK_ALL = (
    "set data.chat_template to a file with a template whose generation marks enclose everything that the assistant says, and "
    "nothing else"
)


@dataclass(frozen=True)
class TrainedSpan:
    """Trained characters start:end of a text; the end-of-turn token is at turn_end:end (None if there is none)."""

    start: int
    end: int
    turn_end: int | None = None


class LossMask:
    """Finds the trained spans of chats in the text of `template`.

    `special_texts` are the tokenizer's special tokens, one of which ends a turn; `split_tokens` are control tokens in the
    template that are not tokens of this tokenizer. Methods raise DataError, which names the template and the document.
    """

    def __init__(self, template: ChatTemplate, special_texts: Sequence[str], split_tokens: Sequence[str] = ()) -> None:
        self._template = template
        self._split_tokens = split_tokens
        self._special_texts = [token for token in special_texts if token]
        # Kinds of conversations whose generation marks are verified.
        self._verified_kinds: set[int] = set()

    def find_spans(self, chat: Document, train_on: TrainOn) -> tuple[str, tuple[TrainedSpan, ...]]:
        """Return the text of the chat and its trained spans in ascending order; a message's own weight overrides `train_on`."""
        if train_on != "all":
            return self._find_answers(chat, find_trained_messages(chat, train_on))
        # Everything except the messages of weight 0.
        text, untrained = self._find_answers(chat, [i for i, message in enumerate(chat.messages) if message.weight == 0])
        spans, start = [], 0
        for span in (*untrained, TrainedSpan(len(text), len(text))):
            if span.start > start:
                # The text before an untrained message ends with the header of that message.
                ends_chat = span.start == len(text)
                spans.append(self._find_turn_end(text, start, len(text)) if ends_chat else TrainedSpan(start, span.start))
            start = span.end
        return text, tuple(spans)

    def _find_answers(self, chat: Document, selected: Sequence[int]) -> tuple[str, tuple[TrainedSpan, ...]]:
        """Return the text of the chat and the spans of the messages with the indices `selected`."""
        if not selected or not self._template.has_marks(chat):
            text = self._template.render(chat)
            self._template.require_complete(chat, text)
            return text, tuple(self._find_answer(chat, text, i) for i in selected)
        text, marks = self._template.render_with_marks(chat, chat.messages)
        self._template.require_complete(chat, text)
        spans = []
        for i, own in self._assign_marks(chat, text, marks, selected).items():
            where = f"{chat.where}, messages[{i}]"
            if not own and _list_required_texts(chat.messages[i]):
                self._template.refuse("does not mark what the assistant says here as generated", where, _MARK_ALL)
            if own and not _contains_all(chat.messages[i], text, own):
                self._template.refuse("marks text that is not the assistant's as generated", where, _MARK_ALL)
            spans += [self._find_turn_end(text, start, end) for start, end in own if start < end]
        self._verify_marks(chat, selected)
        return text, tuple(spans)

    # Templates with generation marks

    def _assign_marks(
        self, chat: Document, text: str, marks: list[tuple[int, int]], selected: Sequence[int]
    ) -> dict[int, list[tuple[int, int]]]:
        """Return the marks of each message with an index in `selected`."""
        turns = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
        if len(marks) == len(turns):
            paired = {i: [mark] for i, mark in zip(turns, marks, strict=True)}
            if all(_contains_all(chat.messages[i], text, own) for i, own in paired.items()):
                return {i: paired[i] for i in selected}
        # A message has several marks or none; the number of marks before and after each message assigns them.
        counts = {0: 0, len(chat.messages): len(marks)}
        for end in {end for i in selected for end in (i, i + 1)} - counts.keys():
            counts[end] = len(self._template.render_with_marks(chat, chat.messages[:end])[1])
        in_order = [counts[end] for end in sorted(counts)]
        if in_order != sorted(in_order):
            self._template.refuse("marks other parts of a message once a later one follows", chat.where)
        own = {i: marks[counts[i] : counts[i + 1]] for i in selected}
        if len(selected) == len(turns) and sum(map(len, own.values())) < len(marks):
            self._template.refuse("marks text that the assistant does not say as generated", chat.where, _MARK_ALL)
        return own

    def _verify_marks(self, chat: Document, selected: Sequence[int]) -> None:
        """Refuse marks around text of other roles, and marks that leave out text of the `selected` messages.

        Two messages may contain the same text, so unique texts are rendered in their place. This takes as long as rendering the
        conversation itself, so it is done once for all conversations with the same kinds of messages.
        """
        kinds = tuple((m.role, bool(m.content.strip()), len(m.tool_calls), bool(m.reasoning_content)) for m in chat.messages)
        if (key := hash((kinds, bool(chat.tools), tuple(selected)))) in self._verified_kinds:
            return
        messages = with_unique_texts(chat)
        text, marks = self._template.render_with_marks(chat, messages)
        generated = "".join(text[start:end] for start, end in marks)
        for i, message in enumerate(messages):
            where = f"{chat.where}, messages[{i}]"
            if message.role != "assistant" and (content := message.content.strip()) and content in generated:
                self._template.refuse(f"marks what the {message.role} says as generated", where, _MARK_ALL)
            arguments = [value for call in message.tool_calls for value in call["function"]["arguments"].values()]
            if i in selected and not all(part in generated for part in (message.content.strip(), *arguments)):
                self._template.refuse("marks only a part of what the assistant says as generated", where, _MARK_ALL)
            if i in selected:
                self._require_marks_of_turn_only(replace(chat, messages=tuple(messages)), i, text, marks)
        self._verified_kinds.add(key)

    def _require_marks_of_turn_only(self, chat: Document, i: int, text: str, marks: Sequence[tuple[int, int]]) -> None:
        """Refuse marks that begin before the header of message `i` ends, or end after its end of turn.

        `chat` has unique texts, `text` is its rendering, and `marks` are the characters start:end of its marks. If the template
        writes a header in no generation prompt, the header is unknown.
        """
        content = chat.messages[i].content.strip()
        at = text.find(content) if content else -1
        mark = next(((start, end) for start, end in marks if start <= at < end), None)
        if mark is None or i == 0:
            return
        try:
            before, prompt = (self._template.render(chat, i, generation_prompt=prompted) for prompted in (False, True))
            turn = self._template.render(chat, i + 1)
        except DataError:
            # The template refuses a conversation that ends here.
            return
        where = f"{chat.where}, messages[{i}]"
        # Some generation prompts open a block of reasoning, which an assistant may also write itself.
        prompt = _REASONING_START.sub("", prompt).rstrip()
        header = prompt[len(before) :].strip() if prompt.startswith(before) else ""
        header_at = text.rfind(header, 0, at) if header else -1
        header_end = header_at + len(header) if header_at >= 0 else len(prompt) if text.startswith(prompt) else 0
        if mark[0] < header_end:
            self._template.refuse("marks the header of the assistant's turn as generated", where, _MARK_ALL)
        own_end = turn[turn.rfind(content) + len(content) :].rstrip()
        marked_end = text[at + len(content) : mark[1]].rstrip()
        if own_end and marked_end.startswith(own_end) and marked_end != own_end:
            self._template.refuse("marks text after the assistant's end of turn as generated", where, _MARK_ALL)

    def _find_turn_end(self, text: str, start: int, end: int) -> TrainedSpan:
        stripped = text[start:end].rstrip()
        token = self._find_end_token(stripped)
        return TrainedSpan(start, end, start + len(stripped) - len(token) if token else None)

    # Templates without generation marks: the text after a rendered prefix

    def _find_answer(self, chat: Document, full: str, i: int) -> TrainedSpan:
        """Return where message `i` is in `full`, the text of the whole chat.

        Text that the template puts between the prompt and the content (such as an empty think block) is part of the span. Some
        templates leave it, or the reasoning, out of earlier turns, so `full` may have the message with or without it.
        """
        message, where = chat.messages[i], f"{chat.where}, messages[{i}]"
        if i == 0:
            remedy = "begin the conversation with a user message, or drop such conversations with data.checks.role_order=drop"
            raise DataError("the conversation begins with the assistant", chat.where, remedy=remedy)
        prefix = self._template.render(chat, i, generation_prompt=True)
        turn = full if i == len(chat.messages) - 1 else self._template.render(chat, i + 1)
        if not full.startswith(prefix) or not turn.startswith(prefix):
            self._template.refuse(_REWRITES, where)
        answer = turn[len(prefix) :].rstrip()
        token = self._find_end_token(answer)
        body = answer.removesuffix(token).rstrip()
        required = _list_required_texts(message)
        positions = [body.rfind(part) for part in required]
        if unwritten := [call for call in _list_called_names(message) if call not in body]:
            self._template.refuse_part(f"does not write the call of the tool {unwritten[0]}", where)
        after = body[positions[0] + len(required[0]) :] if required and positions[0] >= 0 else ""
        if split := next((text for text in self._split_tokens if text in after), None):
            remedy = "set data.chat_template to a file with a template that ends the turn with a token of this tokenizer"
            self._template.refuse_part(
                f"ends the assistant's turn with {split}, which is not a token of this tokenizer", where, remedy
            )
        if min(positions, default=0) < 0 or (not message.tool_calls and not body.endswith(required[0] if required else "")):
            self._template.refuse("changes the message, or puts text between it and the end of the turn", where)
        # Once later messages follow, the text before the message itself may be missing. Comparing at each of its characters would
        # take minutes for a megabyte of reasoning.
        most_missing = min(positions, default=len(body))
        beginning = full[len(prefix) : len(prefix) + len(answer) - most_missing]
        num_missing = answer.find(beginning)
        while 0 <= num_missing <= most_missing:
            written = answer[num_missing:]
            if full.startswith(written, len(prefix)):
                end = len(prefix) + len(written)
                return TrainedSpan(len(prefix), end, end - len(token) if token else None)
            num_missing = answer.find(beginning, num_missing + 1)
        self._template.refuse("renders this message differently once later ones follow", where)

    def _find_end_token(self, text: str) -> str:
        return next((token for token in self._special_texts if text.endswith(token)), "")


def _list_required_texts(message: Message) -> list[str]:
    """Return the texts that every rendering of an assistant's message must contain."""
    return [text for text in (message.content.strip(), *_list_called_names(message)) if text]


def _list_called_names(message: Message) -> list[str]:
    """Return the names of the functions that a message calls."""
    return [call["function"]["name"] for call in message.tool_calls]


def _contains_all(message: Message, text: str, marks: Sequence[tuple[int, int]]) -> bool:
    """Return True if the text within `marks` contains everything that a rendering of the message must contain."""
    marked = "".join(text[start:end] for start, end in marks)
    return all(part in marked for part in _list_required_texts(message))
