"""The data sets included in the launcher, by the path that names them. To add one, write a module and a row of BUILTINS."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launcher.config.sections.data import GENERAL_TEXT, STDLIB_DOCS
from launcher.data.sources.builtin import general_text, stdlib_docs
from launcher.data.sources.documents import Chat, Document, Message, PlainText


@dataclass(frozen=True)
class BuiltinSource:
    """A data set of the launcher.

    Attributes:
        read: yields each document with True if the data set itself holds it out.
        count: returns the number of documents.
        digest: returns a text that changes with the documents.
    """

    read: Callable[[], Iterator[tuple[Document, bool]]]
    count: Callable[[], int]
    digest: Callable[[], str]


def _read_stdlib_docs() -> Iterator[tuple[Document, bool]]:
    for pair in stdlib_docs.list_pairs():
        messages = (Message("user", pair.question), Message("assistant", pair.answer))
        yield Chat(f"{STDLIB_DOCS}:{pair.symbol}", messages), pair.held_out


def _read_general_text() -> Iterator[tuple[Document, bool]]:
    for number, text in enumerate(general_text.list_texts(), 1):
        yield PlainText(f"{GENERAL_TEXT}:{number}", text), False


# Keyed by the path of the source.
BUILTINS: dict[str, BuiltinSource] = {
    STDLIB_DOCS: BuiltinSource(
        _read_stdlib_docs, lambda: len(stdlib_docs.list_pairs()), lambda: f"{STDLIB_DOCS} of Python {sys.version}"
    ),
    GENERAL_TEXT: BuiltinSource(
        _read_general_text, lambda: len(general_text.list_texts()), lambda: f"{GENERAL_TEXT} {general_text.digest()}"
    ),
}
