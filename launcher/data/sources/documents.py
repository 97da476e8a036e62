"""Documents: the content of a row, independent of its format. Picklable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `role` is one of ROLES.

    `tool_calls` of an assistant are {"type": "function", "function": {"name", "arguments"}}, with an "id" if the row has one, and
    the arguments as a mapping. `weight` is 1 or 0 if an assistant's message is trained or not; with None, the settings decide.
    """

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: int | None = None
    reasoning_content: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; the assistant's messages are trained. `tools` are the functions that it may call, in OpenAI's form."""

    where: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """Raw text in two parts; the completion is trained."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class PlainText:
    """Raw text; all of it is trained."""

    where: str
    text: str


# `where` is file:line, or file:row N in a file without lines.
Document = Chat | Completion | PlainText
