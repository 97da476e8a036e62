"""Standard output and error of a command, on which text from files and other machines cannot control the terminal."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from launcher.errors import printable

_COLORS = re.compile(r"\x1b\[[0-9;]*m")


class PrintableStream:
    """Writes escape sequences as visible text. rich, whose sequences must take effect, writes to `rich_proxied_file`."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Make all output in this block printable."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (PrintableStream(raw(stream)) for stream in before)
    # Logging handlers of already imported libraries keep the stream from their import.
    handlers = [
        handler
        for logger in (logging.root, *logging.root.manager.loggerDict.values())
        for handler in getattr(logger, "handlers", ())
        if isinstance(handler, logging.StreamHandler) and handler.stream is before[1]
    ]
    for handler in handlers:
        handler.setStream(cast("TextIO", sys.stderr))
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(before[1])
        sys.stdout, sys.stderr = before


def raw(stream: TextIO) -> TextIO:
    """Return the stream itself, for the launcher's own escape sequences."""
    return getattr(stream, "rich_proxied_file", stream)


def as_plain_lines(text: str) -> str:
    """Return a log's text without colors; overwritten progress bars become separate lines."""
    return _COLORS.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
