"""The messages quoted in docs/troubleshooting.md exist in the source."""

from __future__ import annotations

import ast
import functools
import re

import pytest
from doc_tools import REPO

PAGE = REPO / "docs/troubleshooting.md"
# Placeholder for a value in a message of the source.
_VALUE = "\0"


def quoted_messages() -> list[str]:
    """Return the first cell of each table row: a message with `...` in place of values."""
    rows = re.findall(r"^\| `` ?(.+?) ?`` \||^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [first or second for first, second in rows]


@functools.cache
def templates() -> tuple[str, ...]:
    """Return all string literals in the launcher's source, with a placeholder for each value."""
    found: set[str] = set()
    for file in (REPO / "launcher").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(p.value if isinstance(p, ast.Constant) else _VALUE for p in node.values))
    return tuple(found)


def is_in_the_source(message: str) -> bool:
    """Return whether a text in the source contains the constant parts of the message in order."""
    parts = [part for part in message.split("...") if part]
    pattern = re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
    return any(pattern.search(template) for template in templates())


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_one_of_the_launcher(message: str) -> None:
    assert max(map(len, message.split("..."))) >= 8, "too little of it is constant to be found"
    assert is_in_the_source(message), f"no message of the launcher reads: {message}"


def test_a_quoted_message_that_no_longer_exists_is_detected() -> None:
    assert not is_in_the_source("a message that ... never had")


def test_the_page_covers_many_messages() -> None:
    assert len(quoted_messages()) >= 25
