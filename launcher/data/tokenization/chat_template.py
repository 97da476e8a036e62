"""Renders conversations with a chat template, and refuses templates that leave out parts of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import jinja2
from transformers.utils import chat_template_utils

from launcher.data.sources.documents import Document, Message
from launcher.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last_turn", "all"]

# Texts with the form of a control token: <|...|>, <start_of_turn>, [INST], DeepSeek's full-width form.
_CONTROL_TOKEN = re.compile(
    r"<\|[^|<>\s{}'\"]{1,40}\|>|<(?:start|end)_of_\w+>|\[/?[A-Z][A-Z_]{2,30}\]|<\uff5c[^\uff5c<>{}'\"]{1,40}\uff5c>"
)
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates write the current date, but tokens must not depend on when the cache is built. Llama's templates default to this
# day.
_TODAY = datetime(2024, 7, 26)
_NOT_SURE = (
    "use a template with generation marks (data.chat_template=FILE), or train only the last turn (data.train_on=last_turn), "
    "or change the row"
)
_OTHER_TEMPLATE = "set data.chat_template to a file with a template that writes this part, or remove it from the row"


class ChatTemplate:
    """The chat template of a tokenizer, or `text` in its place; `name` tells the user where it is. Methods raise DataError."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None, name: str = "") -> None:
        self._tokenizer = tokenizer
        self._text = text
        self.name = name or str(tokenizer.name_or_path)
        self._special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)

    @property
    def is_given(self) -> bool:
        """True if there is a template to render chats with."""
        return self._text is not None or bool(self._tokenizer.chat_template)

    def list_split_tokens(self) -> tuple[str, ...]:
        """Return the control tokens in the template's source that the tokenizer splits into several tokens."""
        own = self._tokenizer.chat_template
        source = self._text or ("\n".join(own.values()) if isinstance(own, dict) else own or "")
        candidates = sorted({*_CONTROL_TOKEN.findall(source)})
        known = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        return tuple(
            token
            for token in candidates
            if token not in known and len(self._tokenizer.tokenize(token, add_special_tokens=False)) > 1
        )

    def render(self, chat: Document, num_messages: int | None = None, generation_prompt: bool = False) -> str:
        """Return the text of the first `num_messages` messages (None: of all)."""
        return self._render(chat, chat.messages[:num_messages], generation_prompt, marks=False)[0]

    def render_with_marks(self, chat: Document, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of the chat with `messages` in place of its own, and the characters start:end of each mark."""
        return self._render(chat, messages, generation_prompt=False, marks=True)

    def has_marks(self, chat: Document) -> bool:
        """Return True if the template for this chat has generation marks."""
        return _MARK.search(self._find_source(chat)) is not None

    def require_complete(self, chat: Document, text: str) -> None:
        """Refuse a template whose `text` leaves out the prompts, the tools, or the reasoning before the last answer."""
        for i, message in enumerate(chat.messages):
            if message.role in ("system", "user") and message.content.strip() not in text:
                self.refuse_part(f"leaves out or changes what the {message.role} says", f"{chat.where}, messages[{i}]")
        for i in find_trained_messages(chat, "last_turn"):
            reasoning = (chat.messages[i].reasoning_content or "").strip()
            if i > _find_last_user(chat) and reasoning:
                messages = list(chat.messages)
                messages[i] = replace(messages[i], reasoning_content=None)
                if text.count(reasoning) <= self.render(replace(chat, messages=tuple(messages))).count(reasoning):
                    self.refuse_part("leaves out or changes the assistant's reasoning", f"{chat.where}, messages[{i}]")
        # Compare with the same template, because a tokenizer may have another one for chats without tools.
        if chat.tools and text == self._render(chat, chat.messages, False, marks=False, with_tools=False)[0]:
            self.refuse_part("leaves out the definitions of the tools", chat.where)
        if not any(message.role == "tool" or message.tool_calls for message in chat.messages):
            return
        # Unique texts reveal tool calls and results that are left out; real texts may be escaped.
        unique = with_unique_texts(chat)
        text = self._render(chat, unique, generation_prompt=False, marks=False)[0]
        for i, message in enumerate(unique):
            where = f"{chat.where}, messages[{i}]"
            if message.role == "tool" and message.content.strip() not in text:
                self.refuse_part("leaves out what the tool answers", where)
            for function in (call["function"] for call in message.tool_calls):
                if not all(value in text for value in function["arguments"].values()):
                    name = function["name"]
                    self.refuse_part(f"does not write the call of the tool {name} with all of its arguments", where)

    def refuse(self, does: str, where: str, remedy: str = _NOT_SURE) -> NoReturn:
        """Refuse the template for what it `does`, because the trained tokens are ambiguous."""
        self.refuse_part(f"{does}, so the trained tokens are ambiguous", where, remedy)

    def refuse_part(self, does: str, where: str, remedy: str = _OTHER_TEMPLATE) -> NoReturn:
        """Refuse the template, by default because it leaves out a part of the conversation."""
        raise DataError(f"the chat template {does}", where, self.name, remedy)

    def _find_source(self, chat: Document) -> str:
        if self._text is not None:
            return self._text
        if not self._tokenizer.chat_template:
            remedy = (
                "choose a model with a chat template (often named -Instruct), set data.chat_template to a file with one, "
                "or use the formats prompt_completion or text"
            )
            problem = "the tokenizer has no chat template, and conversations need one"
            raise DataError(problem, chat.where, self.name, remedy)
        try:
            return str(self._tokenizer.get_chat_template(tools=list(chat.tools) or None))
        except ValueError as error:
            raise DataError(str(error), chat.where, self.name, "set data.chat_template to a file") from error

    def _render(
        self, chat: Document, messages: Sequence[Message], generation_prompt: bool, marks: bool, with_tools: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        source = self._find_source(chat)
        rows, tools = list[dict[str, Any]](), (list(chat.tools) if with_tools else []) or None
        for message in messages:
            row: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.tool_calls:
                row["tool_calls"] = list(message.tool_calls)
            for key in ("name", "tool_call_id"):
                if (value := getattr(message, key)) is not None:
                    row[key] = value
            if message.reasoning_content is not None:
                # Templates use either name.
                row["reasoning_content"] = row["thinking"] = message.reasoning_content
            rows.append(row)
        values = {"add_generation_prompt": generation_prompt, **self._special_tokens}
        try:
            compiled = _compile_template(source)
            if not marks:
                return compiled.render(messages=rows, tools=tools, documents=None, **values), []
            texts, spans = chat_template_utils.render_jinja_template(
                conversations=[rows], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **values
            )
            return texts[0], [tuple(span) for span in spans[0]]
        except jinja2.TemplateSyntaxError as error:
            problem = f"the chat template is not valid Jinja: {error.message} (line {error.lineno})"
            remedy = "repair it, or set data.chat_template to a file with another template"
            raise DataError(problem, chat.where, self.name, remedy) from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            problem = f"the chat template refuses this conversation: {error}"
            remedy = (
                "change the row, set data.chat_template to a file with a template that accepts it, or drop conversations whose "
                "roles are out of order with data.checks.role_order=drop"
            )
            raise DataError(problem, chat.where, self.name, remedy) from error


@functools.lru_cache(maxsize=8)
def _compile_template(source: str) -> jinja2.Template:
    """Return the compiled template that tokenizer.apply_chat_template caches; rendering it directly avoids copies."""
    compiled: jinja2.Template = chat_template_utils._compile_jinja_template(source)
    # Every rendering copies the globals, which is slow for Jinja's chained maps.
    compiled.globals = {**compiled.globals, "strftime_now": _TODAY.strftime}
    return compiled


def find_trained_messages(chat: Document, train_on: TrainOn) -> list[int]:
    """Return the indices of the assistant's messages that are trained."""
    last_user = _find_last_user(chat)
    return [
        i
        for i, message in enumerate(chat.messages)
        if message.role == "assistant"
        and (bool(message.weight) if message.weight is not None else train_on != "last_turn" or i > last_user)
    ]


def _find_last_user(chat: Document) -> int:
    return max((i for i, message in enumerate(chat.messages) if message.role == "user"), default=-1)


def with_unique_texts(chat: Document) -> list[Message]:
    """Return the messages with a unique text in place of each content and each tool call argument."""
    messages = []
    for i, message in enumerate(chat.messages):
        calls = []
        for j, call in enumerate(message.tool_calls):
            arguments = {name: f"launcher-{i}-{j}-{k}-end" for k, name in enumerate(call["function"]["arguments"])}
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        content = f"launcher-{i}-end" if message.content.strip() else message.content
        messages.append(replace(message, content=content, tool_calls=tuple(calls)))
    return messages


def with_system(chat: Document, system: str | None) -> Document:
    """Return the chat with `system` as its system message; None leaves it unchanged."""
    if system is None:
        return chat
    rest = chat.messages[1:] if chat.messages[0].role == "system" else chat.messages
    return replace(chat, messages=(Message("system", system), *rest))
